"""An exported folder is an ordinary model for the lm-evaluation-harness."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from clp_lightning.export import export_model
from tests.steerables import WEIGHTS, make_steerable

WORDS = ["tea", "fog", "ink", "owl", "jam", "zip", "sun", "oak"]
TASKS: dict[str, dict[str, Any]] = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "local_perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "local_generation": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "bleu"}, {"metric": "chrf"}],
    },
}


def write_tasks(folder: Path) -> None:
    """Tasks and their data as local files."""
    draw = random.Random(0)
    rows = [
        {
            "question": f"{draw.choice(WORDS)} and {draw.choice(WORDS)}:",
            "choices": [f" {word}" for word in draw.sample(WORDS, 4)],
            "answer": draw.randrange(4),
        }
        for _ in range(40)
    ]
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    for name, task in TASKS.items():
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        content = {"task": name, "test_split": "test", "num_fewshot": 0, **source, **task}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))


def scores(model: Path, tasks: Path) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )
    return {name: found["results"][name] for name in TASKS}


def test_at_alpha_1_an_export_scores_exactly_like_the_base(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    write_tasks(tmp_path)
    base = tiny_folder()
    steerable = make_steerable(base)
    for name, alpha in {"one": 1.0, "mixed": 0.1}.items():
        export_model(steerable, steerable.preference(WEIGHTS, alpha), tmp_path / name)
    expected = scores(base, tmp_path)
    assert scores(tmp_path / "one", tmp_path) == expected
    mixed = scores(tmp_path / "mixed", tmp_path)
    for name in TASKS:
        assert mixed[name] != expected[name]
