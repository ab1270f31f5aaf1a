"""Draws the pictures of these pages, all from the exactly solvable task.

python docs/pictures.py          about a minute on one core; writes docs/pictures/*.png
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from clp_lightning import (
    AnnealedAlpha,
    CLPCallback,
    CLPModule,
    Dirichlet,
    ExactDataModule,
    ExactReward,
    ExactTask,
    Grid,
    LoRA,
    Preference,
)
from clp_lightning.exact import exact_logp, exact_reference_logp, optimum
from clp_lightning.functional import sample_weights, value_matrix

FOLDER = Path(__file__).parent / "pictures"
NAMES = ["first", "second"]
TASK = ExactTask()
STEPS = {40: "#c6dbef", 120: "#6baed6", 400: "#08519c"}


def grid(alpha: float, divisions: int = 20) -> Preference:
    """Weightings of two rewards at one alpha."""
    return Grid(divisions, [alpha]).preferences(NAMES)


def rewards_of(logp: Tensor) -> Tensor:
    """Mean of each reward under log-probabilities of all responses (G, X, S), shape (G, K)."""
    return torch.einsum("gxs,xsk->gk", logp.exp(), TASK.rewards) / TASK.num_contexts


def kl_of(logp: Tensor, reference: Tensor) -> Tensor:
    """KL to the reference, shape (G,)."""
    return (logp.exp() * (logp - reference)).sum(-1).mean(-1)


def averaged_logits(corners: Tensor, weights: Tensor) -> Tensor:
    """Decodes from the weighted mean of the corners' next-token logits.

    Args:
        corners: Log-probability of every response under each corner's policy, shape (K, X, S).
        weights: Shape (G, K).

    Returns:
        Log-probabilities of all responses, shape (G, X, S).
    """
    tokens, length = TASK.num_tokens, TASK.length
    total = torch.zeros(len(weights), *corners.shape[1:], dtype=corners.dtype)
    for t in range(length):
        # (K, X, prefixes, next token): what the corner's policy says after every prefix
        after = corners.reshape(*corners.shape[:2], tokens**t, tokens, -1).logsumexp(-1)
        spoken = torch.einsum("gk,kxpv->gxpv", weights.to(after), after.log_softmax(-1))
        step = spoken.log_softmax(-1).flatten(2)
        total = total + step.repeat_interleave(tokens ** (length - t - 1), -1)
    return total


def label(ax: Axes, reference: Tensor) -> None:
    """Axes in rewards, and the star."""
    x, y = rewards_of(reference[None])[0].tolist()
    ax.scatter(x, y, c="black", marker="*", s=110, zorder=3, label="reference")
    ax.set_xlabel("mean of the first reward")
    ax.set_ylabel("mean of the second reward")
    ax.legend(fontsize="small")


def draw_optimum(reference: Tensor) -> Figure:
    """The best fronts that exist, and what averaging specialists gives."""
    figure = Figure(figsize=(5.2, 4.2), layout="constrained")
    ax = figure.subplots()
    for alpha, shade in ((0.3, "#9ecae1"), (0.1, "#2171b5"), (0.05, "#08306b")):
        points = rewards_of(optimum(reference, TASK.rewards, grid(alpha))[1])
        ax.plot(*points.T.tolist(), color=shade, label=f"best possible, alpha {alpha:g}")
    corners = optimum(reference, TASK.rewards, Preference(torch.eye(2), torch.full((2,), 0.1)))[1]
    mixed = rewards_of(averaged_logits(corners, grid(0.1).weights))
    ax.plot(
        *mixed.T.tolist(), "--", color="#d94801", label="specialists' logits averaged, alpha 0.1"
    )
    ax.set_ylim(top=4.4)  # room for the legend
    label(ax, reference)
    return figure


def draw_values(reference: Tensor) -> Figure:
    """What every policy of the best front is worth to every preference."""
    asked = grid(0.1, 10)
    logp = optimum(reference, TASK.rewards, asked)[1]
    values = value_matrix(rewards_of(logp), kl_of(logp, reference), preference=asked)
    figure = Figure(figsize=(5.2, 4.2), layout="constrained")
    ax = figure.subplots()
    own = values.diagonal()[:, None]
    image = ax.imshow((values - own).tolist(), cmap="viridis", origin="lower")
    figure.colorbar(image, ax=ax, label="V, below that of the preference's own policy")
    ticks = range(0, 11, 2)
    shown = [f"{asked.weights[i, 0]:.1f}" for i in ticks]
    ax.set_xticks(ticks, shown)
    ax.set_yticks(ticks, shown)
    ax.set_xlabel("policy that answers: its weight of the first reward")
    ax.set_ylabel("preference that asks")
    return figure


class Snapshots(Callback):
    """Keeps the exact front of the policy after some steps."""

    def __init__(self) -> None:
        self.fronts: dict[int, Tensor] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step in STEPS:
            logp = exact_logp(pl_module.policy, TASK, grid(0.1, 10))
            self.fronts[trainer.global_step] = rewards_of(logp)


def draw_training() -> Figure:
    """LoRA-CLP from the reference to the best front."""
    with tempfile.TemporaryDirectory() as folder:
        module = CLPModule(
            folder + "/base",
            LoRA(),
            {name: ExactReward(TASK, i) for i, name in enumerate(NAMES)},
            statistics_prompts=0,
            samples_per_prompt=8,
            max_new_tokens=TASK.length,
            lr=4e-3,
            lr_decay="cosine",
            seed=0,
        )
        snapshots = Snapshots()
        trainer = Trainer(
            accelerator="cpu",
            max_steps=max(STEPS),
            gradient_clip_val=1.0,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            callbacks=[CLPCallback(Dirichlet(1.0), AnnealedAlpha(0.6, 0.1, 0.6)), snapshots],
        )
        trainer.fit(module, ExactDataModule(TASK, folder + "/base", batch_size=32))
        reference = exact_reference_logp(module.policy, TASK)
    figure = Figure(figsize=(5.2, 4.2), layout="constrained")
    ax = figure.subplots()
    best = rewards_of(optimum(reference, TASK.rewards, grid(0.1))[1])
    ax.plot(*best.T.tolist(), color="black", label="best possible, alpha 0.1")
    for step, points in snapshots.fronts.items():
        ax.plot(*points.T.tolist(), "o-", ms=4, color=STEPS[step], label=f"after {step} steps")
    label(ax, reference)
    return figure


def draw_concentration() -> Figure:
    """Where Dirichlet weights fall for three rewards."""
    figure = Figure(figsize=(8, 2.7), layout="constrained")
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.75**0.5]])
    for ax, concentration in zip(figure.subplots(1, 3), (0.3, 1.0, 3.0), strict=True):
        draw = torch.Generator().manual_seed(0)
        weights = sample_weights(400, num_rewards=3, concentration=concentration, generator=draw)
        ax.fill(*corners.T.tolist(), color="#eeeeee")
        ax.scatter(*(weights @ corners).T.tolist(), s=4, color="#08519c")
        ax.set_title(f"concentration {concentration:g}", fontsize="medium")
        ax.set_aspect("equal")
        ax.set_axis_off()
    return figure


def main() -> None:
    """Draws all of them."""
    FOLDER.mkdir(exist_ok=True)
    reference = TASK.chain_logp
    figures = {
        "optimum": draw_optimum(reference),
        "values": draw_values(reference),
        "concentration": draw_concentration(),
        "training": draw_training(),
    }
    for name, figure in figures.items():
        figure.savefig(FOLDER / f"{name}.png", dpi=90)


if __name__ == "__main__":
    main()
