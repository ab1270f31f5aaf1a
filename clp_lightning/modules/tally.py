"""Sums over the micro-batches and ranks of one optimizer step, reduced in one collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..functional.advantage import has_siblings, leave_one_out
from ..functional.logprobs import masked_sum
from ..functional.objective import scalarize
from ..types import Rollout

if TYPE_CHECKING:
    from .clp import CLPModule

__all__ = ["Tally", "count_responses"]


class Tally:
    """Named sums and counts, added up over micro-batches, all-reduced once per step."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}

    def add(self, name: str, values: Tensor, where: Tensor | None = None) -> None:
        """Adds the finite ``values`` (where ``where`` is True) to the mean called ``name``."""
        values = values.detach().double()
        counted = values.isfinite() if where is None else values.isfinite() & where
        # Every name is kept, seen or not, so that all ranks reduce the same vector.
        self._sums[name] = self._sums.get(name, 0.0) + float(values[counted].sum())
        self._counts[name] = self._counts.get(name, 0.0) + float(counted.sum())

    def count(self, name: str, value: float) -> None:
        """Adds ``value`` to the total called ``name``."""
        self._sums[name] = self._sums.get(name, 0.0) + value

    def reduce(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means and totals over all micro-batches and ranks; empties the tally.

        Args:
            reduce: Sums a tensor over all ranks.

        Returns:
            A mean that nothing was added to is left out.
        """
        totals = [name for name in sorted(self._sums) if name not in self._counts]
        means = sorted(self._counts)
        vector = [self._sums[name] for name in totals + means] + [
            self._counts[name] for name in means
        ]
        summed = reduce(torch.tensor(vector, dtype=torch.float64)).tolist()
        result = dict(zip(totals, summed, strict=False))
        sums, counts = summed[len(totals) : len(totals) + len(means)], summed[-len(means) :]
        if means:
            result |= {n: s / c for n, s, c in zip(means, sums, counts, strict=True) if c}
        self._sums, self._counts = {}, {}
        return result


def count_responses(
    module: CLPModule, rollout: Rollout, raw: Tensor, ratio: Tensor, logp: Tensor
) -> None:
    """Adds the responses of one micro-batch to the step's sums.

    Args:
        module: Its tally, rewards and conditioner.
        rollout: The kept responses.
        raw: Their rewards, shape (B, K); NaN = not scored.
        ratio: Log-ratio of every token, shape (B, T).
        logp: Log-probability of every token, shape (B, T).
    """
    tally, preference = module.tally, rollout.preference
    tally.count("kept", len(rollout))
    coefficients = module.policy.conditioner.coefficients(preference)
    for i, used in enumerate((coefficients != 0).any(0).tolist()):
        tally.count(f"used/{i}", float(used))
    kl = masked_sum(ratio, rollout.response_mask)  # (B,)
    tally.add("kl", kl)
    tally.add("entropy", -logp, rollout.response_mask)  # its mean is the token entropy
    tally.add("length", rollout.lengths)
    tally.add("truncated", rollout.truncated)
    normalized = module.rewards.normalize(raw).to(kl)
    signals = torch.cat([normalized, kl.unsqueeze(-1)], dim=-1)
    tally.add("value", scalarize(signals, preference=preference))
    spread = leave_one_out(normalized, groups=rollout.groups).nan_to_num()
    for i, name in enumerate(module.rewards.names):
        reward, weight = raw[:, i], preference.weights[:, i].to(raw)
        tally.add(f"reward/{name}", reward)
        tally.add(f"normalized/{name}", normalized[:, i])
        tally.add(f"abstained/{name}", reward.isnan())
        tally.add(f"reward_by_weight/{name}/low", reward, weight < 1 / 3)
        tally.add(f"reward_by_weight/{name}/high", reward, weight > 2 / 3)
        alike = _without_spread(spread[:, i], rollout.groups, ~reward.isnan())
        tally.add(f"without_spread/{name}", alike)


def _without_spread(centred: Tensor, groups: Tensor, scored: Tensor) -> Tensor:
    """For every group of two or more scored responses, 1 if a reward cannot tell them apart."""
    if not len(groups):
        return centred
    groups = groups.to(centred.device)
    compared = scored & has_siblings(groups, among=scored)
    largest = centred.new_full((int(groups.max()) + 1,), -1.0)
    # A response that is not compared counts as -1: less than any deviation.
    deviation = centred.abs().masked_fill(~compared, -1)
    largest = largest.scatter_reduce(0, groups, deviation, "amax")
    return (largest[largest >= 0] <= 1e-6).double()
