"""Small runs through the command line or from Python: configs, rewards, modules."""

from __future__ import annotations

import json
import math
import os
import zlib
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from clp_lightning import (
    CLPCallback,
    CLPModule,
    Grid,
    LoRA,
    Policy,
    Preference,
    Pretrained,
    PromptBatch,
    PromptDataModule,
    Rollout,
    RunCheckpoint,
)
from clp_lightning.policy import Sampling, TransformersEngine
from clp_lightning.rewards import Reward, Scores


def kind(completions: list[str], **_: Any) -> list[float]:
    """A reward: the share of lower-case letters."""
    return [sum(c.islower() for c in text) / max(len(text), 1) for text in completions]


def loud(completions: list[str], **_: Any) -> list[float]:
    """A reward: the share of capitals."""
    return [sum(c.isupper() for c in text) / max(len(text), 1) for text in completions]


def short(completions: list[str], **_: Any) -> list[float]:
    """A reward: minus the number of characters below 'K'."""
    return [-float(sum(c < "K" for c in text)) for text in completions]


def picky(completions: list[str], **_: Any) -> list[float]:
    """A reward that fails on some responses."""
    return [math.inf if text[:1] < "A" else float(text.count("e")) for text in completions]


def fails_on_tea(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """A reward that fails on every response to a prompt about tea."""
    if any("tea" in prompt for prompt in prompts):
        raise ConnectionError("no tea")
    return [float(len(text)) for text in completions]


class Counted(Reward):
    """A reward with an argument: how often a letter up to ``letter`` occurs, less ``target``."""

    def __init__(self, target: float = 1.0, letter: str = "m") -> None:
        self.target, self.letter = target, letter

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        counts = [sum(c <= self.letter for c in text) for text in completions]
        return [-abs(count - self.target) for count in counts]


class Recorder(TransformersEngine):
    """The ordinary engine; appends what it sampled to a file, one JSON line per call.

    Args:
        path: The file; with ``{rank}`` in it, one for each process.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def generate(self, policy: Policy, batch: PromptBatch, n: int, sampling: Sampling) -> Rollout:
        rollout = super().generate(policy, batch, n, sampling)
        record = {
            "epoch": batch.epoch,
            "prompt_ids": rollout.prompt_ids.tolist(),
            "sample": rollout.sample.tolist(),
            "weights": rollout.preference.weights.tolist(),
            "alpha": rollout.preference.alpha.tolist(),
            "tokens": rollout.response_ids.tolist(),
        }
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        with open(self.path.format(rank=rank), "a") as file:
            file.write(json.dumps(record) + "\n")
        return rollout


def write_rows(path: Path, number: int = 20) -> Path:
    """A .jsonl file of short prompts with a column ``topic`` and a response ``answer``."""
    words = ["tea", "fog", "ink", "owl", "jam", "zip", "sun"]
    rows = [
        {
            "prompt": f"{words[i % 7]} {words[i // 7]}" + " ?" * (i % 3),
            "topic": words[i % 7],
            "answer": f"{words[(i + 1) % 7]}.",
        }
        for i in range(number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_config(folder: Path, base: Path, **trainer: Any) -> dict[str, Any]:
    """The config of a run of a few seconds: 16 training and 4 held-out prompts.

    Args:
        folder: Where the data and the run lie.
        base: A model's folder.
        **trainer: Further arguments of the Trainer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "seed_everything": 3,
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "accumulate_grad_batches": 2,
            "check_val_every_n_epoch": None,
            "val_check_interval": 4,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "gradient_clip_val": 1.0,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(folder), "name": "run", "version": ""},
            },
            "callbacks": [
                {"class_path": "CLPCallback"},
                {"class_path": "FrontCallback"},
                {"class_path": "RunCheckpoint", "init_args": {"every_n_train_steps": 3}},
            ],
            **trainer,
        },
        "model": {
            "class_path": "CLPModule",
            "init_args": {
                "pretrained": str(base),
                "conditioner": {
                    "class_path": "LoRA",
                    "init_args": {"rank": 2, "shared_rank": 2},
                },
                "rewards": {
                    "kind": "tests.runs.kind",
                    "short": {"class_path": "tests.runs.Counted"},
                },
                "samples_per_prompt": 3,
                "max_new_tokens": 5,
                "statistics_prompts": 6,
                "statistics_samples": 2,
                "lr": 1.0e-2,
                "grid": {"divisions": 2, "alphas": [0.1]},
            },
        },
        "data": {
            "class_path": "PromptDataModule",
            "init_args": {
                "source": str(write_rows(folder / "rows.jsonl")),
                "holdout": 4,
                "batch_size": 2,
            },
        },
    }


def make_module(
    base: Path | str | Pretrained, kind_of: type[Any] = CLPModule, **options: Any
) -> Any:
    """The module of ``run_config``, made in Python.

    Args:
        base: A model's folder.
        kind_of: A subclass of CLPModule.
        **options: Other arguments of it.
    """
    arguments: dict[str, Any] = {
        "pretrained": base if isinstance(base, Pretrained) else str(base),
        "conditioner": LoRA(rank=2, shared_rank=2),
        "rewards": {"kind": kind, "short": Counted()},
        "samples_per_prompt": 3,
        "max_new_tokens": 5,
        "statistics_prompts": 6,
        "statistics_samples": 2,
        "lr": 1e-2,
        "grid": Grid(2, [0.1]),
        "seed": 3,
    }
    return kind_of(**(arguments | options))


def make_trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    """A quiet Trainer on the CPU, with a CLPCallback if none is given."""
    arguments: dict[str, Any] = {
        "accelerator": "cpu",
        "default_root_dir": folder,
        "logger": False,
        "max_steps": 2,
        "limit_val_batches": 0,
        "enable_checkpointing": any(isinstance(c, RunCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    preferences = [] if any(isinstance(c, CLPCallback) for c in callbacks) else [CLPCallback()]
    return Trainer(callbacks=[*preferences, *callbacks], **(arguments | options))


def make_data(folder: Path, **options: Any) -> PromptDataModule:
    """The data of ``run_config``, made in Python."""
    path = folder / "rows.jsonl"
    if not path.exists():
        write_rows(path)
    arguments: dict[str, Any] = {"source": str(path), "holdout": 4, "batch_size": 2, "seed": 3}
    return PromptDataModule(**(arguments | options))


def write_config(path: Path, config: dict[str, Any]) -> str:
    """Writes a YAML file and returns its path for the command line."""
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return str(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


class Doubled(CLPModule):
    """A subclass that overrides one step: twice the loss."""

    def loss(
        self, logp: Tensor, advantage: Tensor, rollout: Rollout, *, num_responses: float
    ) -> Tensor:
        return 2 * super().loss(logp, advantage, rollout, num_responses=num_responses)


class Backwards(LoRA):
    """A conditioner with an argument of its own: the prompt is read backwards.

    Args:
        mark: Stands before it.
        rank: Rank of each adapter.
    """

    rewrites = True

    def __init__(self, mark: str = "<", rank: int = 1) -> None:
        super().__init__(rank=rank, shared_rank=0)
        self.mark = mark

    def rewrite(self, prompt: Any, preference: Preference) -> Any:
        return self.mark + prompt[::-1]


class Perturbed(CLPModule):
    """Its copies start away from zero, the same for a copy of the same name.

    Attributes:
        seen: Every rollout that was trained on, with its scores.
    """

    seen: list[tuple[Rollout, Scores]]

    def configure_model(self) -> None:
        if self.policy.is_built:
            return
        super().configure_model()
        self.seen = []
        for name, parameter in self.policy.trained_parameters().items():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.add_(noise.to(parameter), alpha=0.1)

    def score(self, rollout: Rollout) -> tuple[Rollout, Scores]:
        self.seen.append(super().score(rollout))
        return self.seen[-1]


class Capture(torch.optim.SGD):
    """Records every gradient and learning rate that a step is made with.

    Attributes:
        gradients: One list per step, in the order of the parameters; None where there is none.
        rates: The learning rate of every group, one list per step.
    """

    gradients: ClassVar[list[list[Tensor | None]]] = []
    rates: ClassVar[list[list[float]]] = []

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        groups = self.param_groups
        grads = [p.grad for group in groups for p in group["params"]]
        self.gradients.append([None if grad is None else grad.clone() for grad in grads])
        self.rates.append([group["lr"] for group in groups])
        super().step()
        return loss
