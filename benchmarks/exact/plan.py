"""What the benchmark runs: a config of configs/exact and the entries changed in it, by path."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Run", "plan"]

SEEDS = (0, 1, 2)
CLP, MODULE = "trainer.callbacks.0.init_args", "model.init_args"
SHORT = {"trainer.max_steps": 600}  # of every ablation
LABELS = {
    "full": "full-CLP",
    "attention": "attention-CLP",
    "lora": "LoRA-CLP",
    "logits": "logit-CLP",
    "soft_prompt": "soft-prompt-CLP",
    "prompt": "prompt-CLP",
    "soups": "Rewarded Soups",
}


@dataclass
class Run:
    """One training run, or one more evaluation of a trained one.

    Attributes:
        group: Which table it belongs to.
        label: Name in the table.
        seed: Of ``seed_everything``.
        config: Path of a file under configs/exact, without its ending.
        change: Entries that replace the file's, by path.
        of: Label of the run in the same group whose checkpoint is evaluated; nothing is trained.
    """

    group: str
    label: str
    seed: int
    config: str
    change: dict[str, Any] = field(default_factory=dict)
    of: str | None = None

    @property
    def name(self) -> str:
        """Its folder; without the seed, that of its siblings."""
        return f"{self.group}/{slug(self.label)}-{self.seed}"


def slug(text: str) -> str:
    """A label as part of a folder's name: ``LoRA, frozen`` is lora-frozen."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def plan() -> list[Run]:
    """Every run, seed by seed, what others build on first."""
    parts = (_methods, _others, _hard, _ablations)
    return [run for seed in SEEDS for part in parts for run in part(seed)]


def _methods(seed: int) -> list[Run]:
    runs = [Run("methods", label, seed, config) for config, label in LABELS.items()]
    mod = Run("methods", "MOD", seed, "soups", {f"{MODULE}.engine": "MOD"}, of="Rewarded Soups")
    return [*runs, mod]


def _others(seed: int) -> list[Run]:
    smallest = {"class_path": "AnnealedAlpha", "init_args": {"start": 0.6, "end": 0.05}}
    dera = {"class_path": "DeRa", "init_args": {"alpha_min": 0.05}}
    at_smallest = {f"{CLP}.alpha": smallest}
    return [
        Run("alpha", "full-CLP, alpha sampled", seed, "alpha"),
        Run("alpha", "full-CLP at alpha 0.05", seed, "alpha", at_smallest),
        Run(
            "alpha",
            "DeRa",
            seed,
            "alpha",
            at_smallest | {f"{MODULE}.engine": dera},
            of="full-CLP at alpha 0.05",
        ),
        Run("others", "full-CLP, K = 3", seed, "three"),
        Run("others", "full-CLP, correlated rewards", seed, "correlated"),
    ]


def _hard(seed: int) -> list[Run]:
    """Every method once; the best of them with every seed, also on half as long a schedule."""
    labels = LABELS if seed == 0 else {"full": LABELS["full"]}
    budgets = [6000, 24000, 72000, 96000, 136000, 160000, 174976]
    half = {"trainer.max_steps": 2734, "trainer.callbacks.1.init_args.budgets": budgets}
    return [
        *(Run("hard", label, seed, f"hard/{config}") for config, label in labels.items()),
        Run("hard", "full-CLP, 175,000 responses", seed, "hard/full", half),
    ]


def _ablations(seed: int) -> list[Run]:
    def alpha(kind: str, **arguments: float) -> dict[str, Any]:
        return {f"{CLP}.alpha": {"class_path": kind, "init_args": arguments}}

    def preferences(per_step: int) -> dict[str, Any]:
        return {
            f"{CLP}.per": "batch",
            "trainer.accumulate_grad_batches": per_step,
            "data.init_args.batch_size": 32 // per_step,
        }

    def concentration(value: float) -> dict[str, Any]:
        return {f"{CLP}.weights.init_args.concentration": value}

    frozen = {f"{MODULE}.conditioner.init_args.rest": "freeze"}
    muon = {"class_path": "MuonAdamW"}
    no_adapter = {f"{MODULE}.conditioner.init_args.shared_rank": 0}
    variants: list[tuple[str, str, dict[str, Any]]] = [
        ("full-CLP as above", "full", {}),
        ("alpha fixed at 0.1", "full", alpha("FixedAlpha", alpha=0.1)),
        ("alpha sampled from 0.05 to 0.6", "full", alpha("UniformAlpha", low=0.05, high=0.6)),
        *((f"{n} preferences a step", "full", preferences(n)) for n in (1, 4, 8)),
        *((f"Dirichlet({c:g})", "full", concentration(c)) for c in (0.3, 0.5, 2.0)),
        ("Muon for matrices", "full", {f"{MODULE}.optimizer": muon, f"{MODULE}.lr": 2e-3}),
        ("critic", "full", {f"{MODULE}.critic": {"class_path": "Critic"}}),
        ("KL to go", "full", {f"{MODULE}.kl": "to_go"}),
        ("KL over the vocabulary", "full", {f"{MODULE}.kl": "vocabulary"}),
        ("attention, S^c trained", "attention", {}),
        ("attention, S^c frozen", "attention", frozen),
        ("LoRA, S^c trained", "lora", {}),
        ("LoRA, S^c frozen", "lora", no_adapter),
        ("logits, S^c trained", "logits", {}),
        ("logits, S^c frozen", "logits", frozen),
    ]
    return [
        Run("ablations", label, seed, config, SHORT | change) for label, config, change in variants
    ]
