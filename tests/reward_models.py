"""Small reward models, their data and a Trainer, for several tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from lightning.pytorch import Trainer

from clp_lightning import (
    Pretrained,
    RewardDataModule,
    RewardModule,
)

WORDS = ["tea", "fog", "ink", "owl", "jam", "zip", "sun"]


def pairs(number: int = 12) -> list[dict[str, Any]]:
    """Plain texts of different lengths; they end as TRL makes them end."""
    return [
        {
            "prompt": f"{WORDS[i % 7]} {WORDS[i // 7]}" + " ?" * (i % 3),
            "chosen": f"{WORDS[(i + 1) % 7]}.<eos>",
            "rejected": f"{WORDS[(i + 3) % 7]}, no" + "!" * (i % 4) + "<eos>",
        }
        for i in range(number)
    ]


def turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def as_chat(row: dict[str, Any]) -> dict[str, Any]:
    answers = {name: turn("assistant", row[name]) for name in ("chosen", "rejected")}
    return {**row, "prompt": turn("user", row["prompt"]), **answers}


def without_prompt(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}


def make_module(base: Path | Pretrained, **options: Any) -> RewardModule:
    name = base if isinstance(base, Pretrained) else str(base)
    return RewardModule(name, **({"lr": 1e-2, "seed": 3} | options))


def make_data(rows: list[dict[str, Any]], **options: Any) -> RewardDataModule:
    arguments: dict[str, Any] = {"holdout": 4, "batch_size": 4, "seed": 3}
    return RewardDataModule(Dataset.from_list(rows), **(arguments | options))


def make_trainer(folder: Path, **options: Any) -> Trainer:
    arguments: dict[str, Any] = {
        "accelerator": "cpu",
        "default_root_dir": folder,
        "logger": False,
        "enable_checkpointing": False,
        "max_steps": 1,
        "limit_val_batches": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**(arguments | options))
