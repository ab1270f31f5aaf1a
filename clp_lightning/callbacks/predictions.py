"""PredictionsCallback: writes predictions.jsonl, every prompt once, in the order of the data."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

__all__ = ["PredictionsCallback"]


class PredictionsCallback(BasePredictionWriter):
    """Writes what ``predict`` answered, with the preference beside every response.

    Args:
        filename: Name of the file within the run's log folder.
    """

    def __init__(self, filename: str = "predictions.jsonl") -> None:
        super().__init__(write_interval="epoch")
        self.filename = filename

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        records = [record for batch in predictions for record in batch]
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, records)
            records = [record for part in parts for record in part]
        folder = trainer.log_dir or trainer.default_root_dir  # communicates: on every rank
        if not trainer.is_global_zero:
            return
        # Ranks take turns and the last batch is filled up with duplicates.
        unique = {_key(record): record for record in reversed(records)}
        path = Path(folder) / self.filename
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("w", encoding="utf-8") as file:
            for key in sorted(unique):
                file.write(json.dumps(unique[key], ensure_ascii=False) + "\n")
        os.replace(partial, path)
        rank_zero_info(f"predictions: {path}")


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    weights = tuple(-weight for weight in record["weights"].values())
    return (record["prompt_id"], record["alpha"], weights, record["sample"])
