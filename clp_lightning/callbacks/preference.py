"""CLPCallback: samples (w, alpha) and attaches them to the batch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Generator, Tensor

from ..described import Described, check_choice
from ..functional import check_alpha, check_weights, sample_weights, simplex_grid
from ..keyed import generator
from ..policy import Policy
from ..types import Preference, PromptBatch

__all__ = [
    "AlphaSampler",
    "AnnealedAlpha",
    "CLPCallback",
    "Dirichlet",
    "Fixed",
    "FixedAlpha",
    "LogUniformAlpha",
    "UniformAlpha",
    "UniformGrid",
    "Vertices",
    "WeightSampler",
]


class WeightSampler(Described, ABC):
    """The weights' part of the sampling distribution Q."""

    @abstractmethod
    def sample(self, names: Sequence[str], generator: Generator) -> Tensor:
        """One weighting, shape (K,)."""


class Dirichlet(WeightSampler):
    """Weights from a symmetric Dirichlet distribution.

    Args:
        concentration: 1 is uniform on the simplex; below 1 the corners are trained more.
    """

    def __init__(self, concentration: float = 0.5) -> None:
        if not (concentration > 0 and math.isfinite(concentration)):
            raise ValueError(f"concentration must be positive; got {concentration}.")
        self.concentration = concentration

    def sample(self, names: Sequence[str], generator: Generator) -> Tensor:
        return sample_weights(
            1, num_rewards=len(names), concentration=self.concentration, generator=generator
        )[0]


class UniformGrid(WeightSampler):
    """Weights from the regular grid on the simplex, each point alike.

    Args:
        divisions: Weights are multiples of 1 / divisions.
    """

    def __init__(self, divisions: int = 10) -> None:
        if divisions < 1:
            raise ValueError(f"divisions must be at least 1; got {divisions}.")
        self.divisions = divisions

    def sample(self, names: Sequence[str], generator: Generator) -> Tensor:
        return _choose(simplex_grid(len(names), self.divisions), generator)


class Vertices(WeightSampler):
    """All weight on one reward, each alike: with ``per="step"`` this is Rewarded Soups."""

    def sample(self, names: Sequence[str], generator: Generator) -> Tensor:
        return _choose(torch.eye(len(names)), generator)


class Fixed(WeightSampler):
    """The same weights always: single-objective finetuning.

    Args:
        weights: By reward name; they sum to 1.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = dict(weights)

    def sample(self, names: Sequence[str], generator: Generator) -> Tensor:
        return check_weights(self.weights, names)


def _choose(rows: Tensor, generator: Generator) -> Tensor:
    return rows[int(torch.randint(len(rows), (), generator=generator))]


class AlphaSampler(Described, ABC):
    """The KL strength's part of the sampling distribution Q."""

    @abstractmethod
    def sample(self, progress: float, generator: Generator) -> float:
        """One alpha in [0, 1].

        Args:
            progress: Share of the optimizer steps that are done, in [0, 1]; NaN where their
                number is not known.
            generator: Where chance comes from.
        """

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Least and largest alpha of a run; None where a subclass does not say."""
        return None


class FixedAlpha(AlphaSampler):
    """The same alpha always. A small one makes the corners stick early: see AnnealedAlpha.

    Args:
        alpha: KL strength in [0, 1].
    """

    def __init__(self, alpha: float = 0.1) -> None:
        self.alpha = check_alpha(alpha)

    def sample(self, progress: float, generator: Generator) -> float:
        return self.alpha

    @property
    def bounds(self) -> tuple[float, float]:
        return self.alpha, self.alpha


class AnnealedAlpha(AlphaSampler):
    """From ``start`` to ``end`` in a straight line, then ``end``.

    Args:
        start: KL strength at the first step.
        end: KL strength from ``until`` on.
        until: Share of the steps after which ``end`` is reached.
    """

    def __init__(self, start: float = 0.6, end: float = 0.1, until: float = 0.6) -> None:
        self.start, self.end = check_alpha(start), check_alpha(end)
        if not 0 < until <= 1:
            raise ValueError(f"until is a share of the steps, in (0, 1]; got {until}.")
        self.until = until

    def sample(self, progress: float, generator: Generator) -> float:
        if math.isnan(progress):
            raise ValueError(
                "The number of training steps is not known, so alpha cannot be annealed; set the "
                "Trainer's max_steps or max_epochs, or use FixedAlpha."
            )
        share = min(1.0, progress / self.until)
        return self.start + share * (self.end - self.start)

    @property
    def bounds(self) -> tuple[float, float]:
        return min(self.start, self.end), max(self.start, self.end)


class UniformAlpha(AlphaSampler):
    """Uniform in [low, high].

    Args:
        low: Least KL strength.
        high: Largest.
    """

    def __init__(self, low: float = 0.05, high: float = 0.5) -> None:
        self.low, self.high = check_alpha(low), check_alpha(high)
        if low > high:
            raise ValueError(f"low must not be above high; got {low} and {high}.")

    def sample(self, progress: float, generator: Generator) -> float:
        share = float(torch.rand((), generator=generator, dtype=torch.float64))
        return self.low + share * (self.high - self.low)

    @property
    def bounds(self) -> tuple[float, float]:
        return self.low, self.high


class LogUniformAlpha(UniformAlpha):
    """Uniform in the logarithm of alpha between low and high, both above 0.

    Args:
        low: Least KL strength.
        high: Largest.
    """

    def __init__(self, low: float = 0.05, high: float = 0.5) -> None:
        super().__init__(low, high)
        if low <= 0:
            raise ValueError(f"low must be above 0 on a logarithmic scale; got {low}.")

    def sample(self, progress: float, generator: Generator) -> float:
        share = float(torch.rand((), generator=generator, dtype=torch.float64))
        return self.low * (self.high / self.low) ** share


class CLPCallback(Callback, Described):
    """Samples a preference for every prompt, or one for a batch or a step.

    Draws depend on (seed, epoch, prompt id), or on (seed, step), never on history or rank: a
    resumed run, or one on more processes, draws what the first run drew. It has no state.

    Args:
        weights: How weights are drawn; ``Dirichlet(0.5)`` if None.
        alpha: How the KL strength is drawn; ``AnnealedAlpha(0.6, 0.1, 0.6)`` if None.
        per: One preference per ``prompt``, per training ``batch`` (keyed by its first prompt;
            full-rank conditioning needs it), or per optimizer ``step``. By default per prompt
            where conditioner and model can mix rows, else per batch.
    """

    def __init__(
        self,
        weights: WeightSampler | None = None,
        alpha: AlphaSampler | None = None,
        per: Literal["prompt", "batch", "step"] | None = None,
    ) -> None:
        self.weights = weights or Dirichlet()
        self.alpha = alpha or AnnealedAlpha()
        self.per = check_choice("per", per, [None, "prompt", "batch", "step"])

    @property
    def alpha_range(self) -> tuple[float, float] | None:
        """Least and largest alpha that a run trains; written into its checkpoints."""
        return self.alpha.bounds

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # A wrong name or number of weights is an error before the model is loaded.
        names = self._names(pl_module)
        drawn = self.weights.sample(names, generator(0))
        if drawn.shape != (len(names),):
            raise ValueError(
                f"{type(self.weights).__name__}.sample returned shape {tuple(drawn.shape)}; it "
                f"must be one weight for each of the rewards {names}: ({len(names)},)."
            )
        check_weights(dict(zip(names, drawn.tolist(), strict=True)), names)
        self._check_per(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_per(pl_module)  # once more: now there is a model

    def _check_per(self, pl_module: LightningModule) -> None:
        if self.per == "prompt" and self._one_per_batch(pl_module):
            raise ValueError(
                "This conditioner trains with one preference per batch; set CLPCallback's per to "
                "'batch' (and accumulate_grad_batches for several preferences per step)."
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PromptBatch, batch_idx: int
    ) -> None:
        steps = trainer.estimated_stepping_batches
        progress = trainer.global_step / steps if math.isfinite(steps) else math.nan
        generators = self.generators(trainer, pl_module, PromptBatch.check(batch))
        names = self._names(pl_module)
        batch.preference = self.sample(names, progress, generators).to(pl_module.device)

    def generators(
        self, trainer: Trainer, pl_module: LightningModule, batch: PromptBatch
    ) -> list[Generator]:
        """One generator for each prompt of the batch; equal keys, equal draws."""
        seed: Any = pl_module.seed
        per = self.per or ("batch" if self._one_per_batch(pl_module) else "prompt")
        ids = batch.prompt_ids.tolist()
        if per == "step":
            return [generator(seed, trainer.global_step) for _ in ids]
        if per == "batch":
            size = batch.nominal_size or len(ids)
            ids = [ids[row - row % size] for row in range(len(ids))]
        return [generator(seed, batch.epoch, prompt_id) for prompt_id in ids]

    def sample(
        self, names: Sequence[str], progress: float, generators: Sequence[Generator]
    ) -> Preference:
        """The preferences of a batch, one row per generator; override to draw from another Q."""
        weights = torch.stack([self.weights.sample(names, g) for g in generators])
        alpha = [self.alpha.sample(progress, g) for g in generators]
        return Preference(weights, torch.tensor(alpha, dtype=weights.dtype))

    @staticmethod
    def _names(pl_module: Any) -> list[str]:
        names: list[str] = pl_module.rewards.names
        return names

    @staticmethod
    def _one_per_batch(pl_module: Any) -> bool:
        """Whether the conditioner, or it on this model, cannot train on mixed batches."""
        policy: Policy = pl_module.policy
        if policy.conditioner.one_preference_per_batch:
            return True
        return policy.is_built and policy.conditioner.why_not_rows() is not None
