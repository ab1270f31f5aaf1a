"""The configs for large models: what their headers say, and small stand-ins for what they name."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, DatasetDict

from tests.rewards.classifiers import nli_model, save_classifier
from tests.tiny import VOCABULARY, save_tiny

CONFIGS = Path(__file__).parents[1] / "configs"
# The judge is asked over an endpoint; its config has tests of its own.
SUITE = sorted(
    path
    for folder in ("summarization", "chat")
    for path in (CONFIGS / folder).rglob("*.yaml")
    if path.name != "judge.yaml"
)

# Every second character ends a response, or the stand-ins would talk to the limit.
STOPS = {"eos_token_id": list(range(1, len(VOCABULARY), 2))}
WORDS = ["tea", "fog", "ink", "owl", "jam", "zip", "sun"]


def relative(path: Path) -> str:
    """As commands write it, from the repository's root."""
    return str(path.relative_to(CONFIGS.parent))


def commands(path: Path) -> list[list[str]]:
    """The arguments of the commands in a config's header."""
    lines = re.findall(r"^# {3}python -m clp_lightning (.*)$", path.read_text(), re.MULTILINE)
    return [shlex.split(line) for line in lines]


def own_configs(path: Path) -> list[str]:
    """The ``--config`` arguments of the header's command with this file, or the file alone."""
    alone = ["--config", relative(path)]
    own = next((command for command in commands(path) if relative(path) in command), alone)
    return [arg for flag, arg in pairwise(own) if flag == "--config"]


def field(path: Path, name: str) -> list[str]:
    """What the header says after ``# name:``, once or several times."""
    return re.findall(rf"^# {name}: (.+)$", path.read_text(), re.MULTILINE)


def expectation(path: Path) -> dict[str, Any]:
    """The block that says how long a run may take and what it must reach."""
    (text,) = field(path, "expect")
    read: dict[str, Any] = yaml.safe_load(text)
    return read


def make_stand_ins(folder: Path) -> None:
    """Small models and data below ``folder``, in the places of their names on the hub.

    A folder comes before the hub, so the configs are used as they are.
    """
    for name in ("google-t5/t5-base", "google-t5/t5-large", "models/true"):
        save_tiny(folder / name, "t5", generation=STOPS)
    save_tiny(folder / "Qwen/Qwen2.5-1.5B-Instruct", "qwen3", chat=True, generation=STOPS)
    blocks = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}  # of 64, to be 4-bit
    save_tiny(folder / "Qwen/Qwen2.5-7B-Instruct", "qwen3", chat=True, generation=STOPS, **blocks)
    labels = ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"]
    nli_model(folder / "FacebookAI/roberta-large-mnli", labels)
    save_classifier(folder / "answerdotai/ModernBERT-base", "bert", ["LABEL_0", "LABEL_1"])
    for virtue in ("helpful", "harmless"):
        save_classifier(folder / f"Ray2333/gpt2-large-{virtue}-reward_model", "llama", ["LABEL_0"])

    texts = [f"{WORDS[i % 7]} {WORDS[i // 7]} {WORDS[(i + 2) % 7]}" for i in range(36)]
    short = [" ".join(text[:3]) for text in texts]  # letters alone, which random text has too
    posts = [f"POST: {text}\n\nTL;DR:" for text in texts]
    sets: dict[str, dict[str, Any]] = {
        "EdinburghNLP/xsum@refs/convert/parquet": {
            "document": texts,
            "summary": short,
            "id": [str(i) for i in range(36)],
        },
        "trl-lib/tldr": {"prompt": posts, "completion": [f" {s}" for s in short]},
        "trl-lib/tldr-preference": {
            "prompt": posts,
            "chosen": [f" {s}" for s in short],
            "rejected": [f" {s[::-1]}" for s in short],
        },
        "PKU-Alignment/PKU-SafeRLHF": {"prompt": texts, "response_0": short, "is_safe": short},
        "trl-lib/DeepMath-103K": {
            "prompt": [[{"role": "user", "content": text}] for text in texts],
            "solution": [f"${i}$" for i in range(36)],
        },
    }
    for name, columns in sets.items():
        held_out = "test" if name.startswith(("PKU", "trl-lib/DeepMath")) else "validation"
        rows = Dataset.from_dict(columns)
        parts = {"train": rows.select(range(32)), held_out: rows.select(range(32, 36))}
        DatasetDict({split: Dataset.from_list(list(p)) for split, p in parts.items()}).save_to_disk(
            folder / name
        )
