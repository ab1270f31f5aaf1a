"""Fronts written by hand, as a run writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from clp_lightning.metrics import FrontReport, FrontSamples
from clp_lightning.types import Preference

NAMES = ["kind", "short"]
CORNERS = Preference(torch.eye(2), torch.tensor([0.2, 0.2]))
COST = {
    "optimizer_steps": 10,
    "sampled_tokens": 600,
    "responses": 200,
    "reward_calls": 400,
    "wall_s": 2.5,
    "trained_parameters": 7,
    "models": 1,
    "forwards": 1,
}


def write_front(
    folder: Path,
    rewards: Any,
    kl: Any = 0.0,
    *,
    grid: Preference = CORNERS,
    names: list[str] = NAMES,
    units: Any = (0.0, 1.0),
    seed: int = 0,
    closed_gap: list[float | None] | None = None,
    unseen: list[float | None] | None = None,
    ids: list[int] | None = None,
    **changes: Any,
) -> Path:
    """A run's folder with front.json and front_samples.parquet, one response a cell.

    Args:
        folder: Made if there is none.
        rewards: Raw, per prompt, of the reference and every point, shape (N, G + 1, K).
        kl: Of the points, shape (G,) or a number.
        grid: G rows.
        names: Of the K rewards.
        units: Mean and deviation that the run normalises with, for all rewards alike.
        seed: Of the run.
        closed_gap: Of every point.
        unseen: Closed gap on unseen contexts.
        ids: Of the prompts; 0, 1, ... if left out.
        **changes: Other values of front.json: of its decoding, if they stand there.
    """
    raw: Tensor = torch.as_tensor(rewards, dtype=torch.float32)
    num_prompts, points, k = raw.shape
    prompt, point = torch.meshgrid(
        torch.tensor(ids or range(num_prompts)), torch.arange(-1, points - 1), indexing="ij"
    )
    point = point.flatten()
    own_kl = torch.as_tensor(kl, dtype=torch.float32).expand(points - 1)
    mean, std = units
    samples = FrontSamples(
        prompt_id=prompt.flatten(),
        point=point,
        sample=torch.zeros_like(point),
        rewards=raw.reshape(-1, k),
        normalized=((raw - mean) / std).reshape(-1, k),
        log_ratio=torch.cat([torch.zeros(1), own_kl])[point + 1],
        length=point + 5,
        truncated=point < 0,
    )
    report = FrontReport(samples, names, grid)
    decoding = {"engine": "TransformersEngine", "max_new_tokens": 4, "temperature": 1.0}
    front = {
        "stage": "validate",
        "checkpoint": None,
        "global_step": 10,
        "seed": seed,
        "decoding": {**decoding, "seed": seed},
        **report.to_dict(),
        "cost": dict(COST),
    }
    for name, gaps in (("closed_gap", closed_gap), ("closed_gap_unseen", unseen)):
        front["metrics"][name] = gaps and {"mean": None, "min": None, "points": gaps}
    for name, value in changes.items():
        place = front["decoding"] if name in front["decoding"] and name != "seed" else front
        place[name] = value
    folder.mkdir(parents=True)
    (folder / "front.json").write_text(json.dumps(front))
    columns = {name: column.numpy() for name, column in report.samples.columns(names).items()}
    pd.DataFrame(columns).to_parquet(folder / "front_samples.parquet", index=False)
    return folder


def flat(points: Any, num_prompts: int = 2) -> Tensor:
    """The same rewards for all prompts, of the reference and every point, (N, G + 1, K)."""
    return torch.tensor(points, dtype=torch.float32).expand(num_prompts, -1, -1)
