"""What the rewards were asked about some responses, and what several such questions come to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .calling import Call, Samples, same

__all__ = ["Asked", "joined_extra", "mean_metrics", "same_samples"]


@dataclass
class Asked:
    """Some responses that every reward was called on.

    Attributes:
        samples: What the rewards were given, lists with one entry per response.
        context: Their other arguments.
        calls: One per reward, in the order of the bank.
        extra: Columns reported with ``log_extra`` so far.
        metrics: Values reported with ``log_metric`` so far.
    """

    samples: Samples
    context: dict[str, Any] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    extra: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def __len__(self) -> int:
        return len(self.samples["completions"])


def mean_metrics(parts: Sequence[Asked]) -> dict[str, float]:
    """The mean of every metric; a part counts as often as it has responses.

    So the mean over a batch is the same in one part and in several.
    """
    means: dict[str, float] = {}
    for name in dict.fromkeys(name for part in parts for name in part.metrics):
        told = [(len(part), part.metrics[name]) for part in parts if name in part.metrics]
        rows = sum(size for size, _ in told)
        means[name] = sum(size / rows * (sum(found) / len(found)) for size, found in told)
    return means


def joined_extra(parts: Sequence[Asked]) -> dict[str, list[Any]]:
    """Every column over all responses; None where a part did not report it."""
    names = dict.fromkeys(name for part in parts for name in part.extra)
    return {
        name: [value for part in parts for value in part.extra.get(name, [None] * len(part))]
        for name in names
    }


def same_samples(parts: Sequence[Asked], samples: Samples) -> bool:
    """Whether ``parts`` were, one after the other, given exactly ``samples``."""
    if any(part.samples.keys() != samples.keys() for part in parts):
        return False
    given = {name: [v for part in parts for v in part.samples[name]] for name in samples}
    # Token ids are new numbers each time; all else is the very same text or object.
    return given.pop("completion_ids") == samples["completion_ids"] and all(
        same(values, samples[name]) for name, values in given.items()
    )
