"""Is the difference of two hypervolumes more than chance?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import hypervolume
from ..keyed import generator
from ..metrics.bootstrap import cluster_means

__all__ = ["PERMUTATIONS", "permutation_test"]

PERMUTATIONS = 1000
_AT_ONCE = 100
_SEED = 0  # of the permutations: the same fronts give the same p


def permutation_test(first: Tensor, second: Tensor, reference_point: Tensor) -> float | None:
    """Two-sided p-value of a difference in hypervolume, labels exchanged within prompts.

    All runs answered the same prompts. Under the hypothesis that the two methods are alike, a
    prompt's answers (those to the whole grid together) may as well have come from any of their
    runs, so each permutation deals them anew, prompt by prompt. The statistic is the difference of
    the methods' hypervolumes, each the mean over its runs. The test is about the trained policies
    that it is given: chance between trainings is not in p.

    Args:
        first: Normalised rewards of a method, per run, prompt and point, shape (S, N, G, K).
        second: Those of another method, shape (S', N, G, K).
        reference_point: Shape (K,).

    Returns:
        (1 + number of permutations at least as far from 0) / (1 + 1,000); None where a reward was
        never scored at a point.
    """
    cells = torch.cat([first, second])
    num_runs, num_prompts = cells.shape[:2]

    def differences(dealt: Tensor) -> Tensor:
        """Of permutations (R, runs, N), which run each answer goes to, shape (R,)."""
        counts = F.one_hot(dealt, num_runs).transpose(-1, -2)  # (R, runs, runs, N)
        counts = counts.reshape(-1, num_runs * num_prompts).double()
        volumes = hypervolume(cluster_means(cells.flatten(0, 1), counts), reference_point)
        volumes = volumes.reshape(-1, num_runs)
        return volumes[:, : len(first)].mean(-1) - volumes[:, len(first) :].mean(-1)

    as_it_is = torch.arange(num_runs).reshape(1, -1, 1).expand(-1, -1, num_prompts)
    observed = differences(as_it_is)
    if observed.isnan():
        return None
    random, extreme = generator(_SEED, 3), 0
    # Equal but for rounding is equal: a deal that exchanges everything must count.
    bound = observed.abs() * (1 - 1e-9) - 1e-12
    for _ in range(PERMUTATIONS // _AT_ONCE):
        order = torch.rand(_AT_ONCE, num_runs, num_prompts, generator=random).argsort(1)
        extreme += int((~(differences(order).abs() < bound)).sum())
    return (1 + extreme) / (1 + PERMUTATIONS)
