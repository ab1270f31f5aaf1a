"""SamplesCallback: held-out prompts, answered under a few preferences."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..metrics import Grid
from .checkpoint import save_first
from .loggers import log_table

__all__ = ["SamplesCallback"]


class SamplesCallback(Callback):
    """Shows what turning the dial does: greedy answers to held-out prompts.

    They are printed at the end of ``fit`` and logged as a table.

    Args:
        prompts: Number of prompts.
        grid: Preferences to answer under; the corners of the module's grid if None.
    """

    def __init__(self, prompts: int = 1, grid: Grid | None = None) -> None:
        self.prompts = prompts
        self.grid = grid
        self._rows: list[tuple[str, str, str]] = []

    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        save_first(trainer, pl_module)
        loaders = trainer.val_dataloaders
        if not loaders:
            return
        batch = next(iter(loaders[0] if isinstance(loaders, list) else loaders))
        batch = batch.select(range(min(self.prompts, len(batch))))
        module: Any = pl_module
        grid = self.grid or Grid(divisions=1, alphas=module.grid.alphas[:1])
        names: list[str] = module.rewards.names
        preferences = grid.preferences(names)
        greedy = replace(module.sampling, temperature=0.0)
        rows = [row for row in range(len(batch)) for _ in range(len(preferences))]
        points = torch.arange(len(preferences)).repeat(len(batch))
        asked = replace(
            batch.select(rows), preference=preferences[points].to(module.device), parts=1
        )
        rollout = module.engine.generate(module.policy, asked, 1, greedy)
        self._rows = [
            (_text(rollout.prompts[b]), _weights(rollout.preference.weights[b].tolist(), names), c)
            for b, c in enumerate(rollout.completions)
        ]
        columns = ["prompt", "weights", "response"]
        log_table(trainer.loggers, "samples", columns, self._rows, trainer.global_step)

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for prompt, rows in groupby(self._rows, key=itemgetter(0)):
            table = Table("weights", "response", title=Text(prompt, style="italic"))
            for _, weights, response in rows:
                table.add_row(Text(weights), Text(response))
            Console().print(table)


def _text(prompt: object) -> str:
    """The prompt's last words, without its chat markup."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])  # type: ignore[index]


def _weights(weights: list[float], names: list[str]) -> str:
    return ", ".join(f"{n}={w:.2g}" for n, w in zip(names, weights, strict=True) if w)
