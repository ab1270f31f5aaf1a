"""What a policy's responses are worth at a preference, prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..functional import log_ratio, masked_sum
from ..metrics import Estimate
from ..metrics.bootstrap import cluster_means, resample_counts
from ..policy import Sampling
from ..rewards import RewardBank
from ..steerable import SteerablePolicy
from ..types import Preference, PromptBatch

__all__ = ["FURTHER", "Measured", "Meter", "first_prompts", "quantities_of"]

FURTHER = ("kl", "length")
"""What is measured beside the rewards: nats and tokens per response. A reward of that name hides
it."""


@dataclass
class Measured:
    """Numbers of one preference.

    Attributes:
        preference: One row.
        cells: Mean over a prompt's responses, NaN where nothing was scored, shape (P, Q), in the
            order of ``quantities``.
    """

    preference: Preference
    cells: Tensor

    @property
    def means(self) -> Tensor:
        """Means over the prompts, shape (Q,)."""
        return self.cells.nanmean(0)

    @property
    def errors(self) -> Tensor:
        """Standard errors of the means, shape (Q,)."""
        count = (~self.cells.isnan()).sum(0)
        squares = (self.cells - self.means).square().nansum(0)
        return (squares / (count - 1).clamp(min=1) / count).sqrt()

    def estimates(self) -> list[Estimate]:
        """Means with their 95 % intervals over prompts, Q of them."""
        resampled = cluster_means(self.cells, resample_counts(len(self.cells)))
        return [Estimate.of(column, len(self.cells)) for column in resampled.unbind(-1)]


def quantities_of(rewards: Sequence[str]) -> list[str]:
    """What is measured: the raw rewards, then ``FURTHER``, each name once.

    Example:
        >>> quantities_of(["kind", "length"])
        ['kind', 'length', 'kl']
    """
    return [*rewards, *(name for name in FURTHER if name not in rewards)]


class Meter:
    """Answers the same prompts under any preference, always with the same random numbers.

    So a difference between two preferences is the policy's, and asking twice gives the same.

    Args:
        policy: The policy.
        rewards: Its rewards.
        batch: P prompts with the columns that the rewards need.
        samples: Responses per prompt and preference.
        rows: Responses that are sampled at once.
        seed: Key of all draws.
        with_kl: Measure the KL, which asks the reference too; else it is NaN.
    """

    def __init__(
        self,
        policy: SteerablePolicy,
        rewards: RewardBank,
        batch: PromptBatch,
        samples: int = 1,
        rows: int = 128,
        seed: int = 0,
        with_kl: bool = True,
    ) -> None:
        rewards.check_columns(list(batch.columns))
        self.policy, self.rewards, self.batch, self.samples = policy, rewards, batch, samples
        self.rows, self.with_kl = max(1, rows // samples), with_kl
        self.sampling = Sampling(
            policy.trained.max_new_tokens, policy.trained.temperature, seed=seed
        )

    @property
    def quantities(self) -> list[str]:
        """Names of the Q columns."""
        return quantities_of(self.rewards.names)

    def measure(self, preferences: Preference) -> list[Measured]:
        """Every prompt under every row of ``preferences``."""
        count, points = len(self.batch), len(preferences)
        # Preference by preference, because a model that cannot mix rows takes one at a time.
        point = torch.arange(points).repeat_interleave(count)
        row = torch.arange(count).repeat(points)
        parts = []
        for part in torch.arange(len(row)).split(self.rows):
            asked = self.batch.select(row[part].tolist())
            parts.append(self._answer(replace(asked, preference=preferences[point[part]])))
        cells = torch.cat(parts).view(points, count, -1)
        return [Measured(preferences[i : i + 1], cells[i]) for i in range(points)]

    @torch.no_grad()
    def _answer(self, batch: PromptBatch) -> Tensor:
        """Mean numbers of each prompt's responses, shape (P, Q)."""
        policy = self.policy
        assert batch.preference is not None
        batch = replace(batch, preference=batch.preference.to(policy.policy.model.device))
        rollout = policy.engine.generate(policy.policy, batch, self.samples, self.sampling)
        kl = torch.full((len(rollout),), torch.nan)
        if self.with_kl:
            logp = policy.logprobs(rollout) if rollout.logp is None else rollout.logp
            ratio = log_ratio(logp, policy.reference_logprobs(rollout))
            kl = masked_sum(ratio, rollout.response_mask)
        scores = dict(zip(self.rewards.names, self.rewards(rollout).raw.unbind(-1), strict=True))
        columns = {"kl": kl, "length": rollout.lengths} | scores
        numbers = torch.stack([columns[name].cpu().double() for name in self.quantities], -1)
        return numbers.view(len(batch), self.samples, -1).nanmean(1)


def first_prompts(batches: Sequence[PromptBatch], count: int) -> PromptBatch:
    """The first ``count`` prompts of some batches as one, for evaluation."""
    prompts = [prompt for batch in batches for prompt in batch.prompts]
    columns = {
        name: [value for batch in batches for value in batch.columns[name]]
        for name in batches[0].columns
    }
    ids = torch.cat([batch.prompt_ids for batch in batches])
    everything = PromptBatch(prompts, ids, columns)
    return everything.select(range(min(count, len(prompts))))
