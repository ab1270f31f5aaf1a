"""Whole batches in an order of their own, at a position that survives a resume.

The loader counts the batches that were *taken* from it, so neither prefetching workers nor a
second ``iter()`` (Lightning calls it at will) can move the position or the count of passes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, DistributedSampler

from .. import keyed
from ..types import PromptBatch

__all__ = ["BatchKey", "PromptLoader", "PromptSampler", "by_length", "deal", "row_order"]

_BATCHES_SORTED = 8


@dataclass(frozen=True)
class BatchKey:
    """What the data set needs to build one batch.

    Attributes:
        rows: Rows of the data set.
        epoch: The sampler's count of passes over the data.
        part: Which slice of the generation batch this step trains, 0 .. parts - 1.
        parts: How often the same rows are yielded.
        nominal_size: Prompts in a full slice.
    """

    rows: tuple[int, ...]
    epoch: int
    part: int
    parts: int
    nominal_size: int


def row_order(num_rows: int, *, seed: int, epoch: int) -> list[int]:
    """All rows in the order of one pass, which depends on (seed, epoch) only.

    Example:
        >>> sorted(row_order(5, seed=0, epoch=3))
        [0, 1, 2, 3, 4]
    """
    return cast(
        "list[int]", torch.randperm(num_rows, generator=keyed.generator(seed, epoch)).tolist()
    )


def by_length(
    order: Sequence[int], lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int
) -> list[int]:
    """Rows of like length side by side, in batches that have no order.

    Of every eight batches the rows are sorted, and the batches shuffled.

    Args:
        order: Rows in the order of a pass.
        lengths: Of every row of the data set.
        batch_size: Rows in a batch.
        seed: As in ``row_order``.
        epoch: As in ``row_order``.

    Example:
        >>> by_length([0, 1, 2, 3], lengths=[9, 1, 8, 2], batch_size=2, seed=0, epoch=0)
        [2, 0, 1, 3]
    """
    found: list[int] = []
    whole = len(order) // batch_size * batch_size  # what fills no batch is left as it is
    for start in range(0, whole, _BATCHES_SORTED * batch_size):
        rows = order[start : min(start + _BATCHES_SORTED * batch_size, whole)]
        rows = sorted(rows, key=lengths.__getitem__)
        draw = keyed.generator(seed, epoch, start)
        for number in torch.randperm(len(rows) // batch_size, generator=draw).tolist():
            found += rows[number * batch_size : (number + 1) * batch_size]
    return [*found, *order[whole:]]


def deal(
    order: Sequence[int], batch_size: int, *, rank: int, world_size: int, drop_last: bool
) -> list[tuple[int, ...]]:
    """The batches of one process; batch k of all goes to process ``k % world_size``.

    Args:
        order: Rows in the order of this pass.
        batch_size: Rows in a full batch.
        rank: This process.
        world_size: Number of processes.
        drop_last: Leave out a short last batch and batches that do not go round; otherwise keep
            both and repeat the first batches, so that every process has the same number.

    Example:
        >>> deal(range(7), 2, rank=1, world_size=2, drop_last=True)
        [(2, 3)]
        >>> deal(range(5), 2, rank=1, world_size=2, drop_last=False)
        [(2, 3), (0, 1)]
    """
    batches = [tuple(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]
    if drop_last:
        full = len(order) // batch_size
        batches = batches[: full - full % world_size]
    else:
        missing = -len(batches) % world_size
        batches += [batches[k % len(batches)] for k in range(missing)]
    return batches[rank::world_size]


# A DistributedSampler, because that is what Lightning leaves alone under DDP.
class PromptSampler(DistributedSampler):
    """Yields the :class:`BatchKey` of every batch of this process, from ``position`` on.

    Args:
        num_rows: Rows of the data set.
        batch_size: Prompts in a slice; a batch holds ``parts`` slices.
        seed: Shuffles, together with the epoch; None keeps the rows in order.
        parts: Yield every batch this many times, as part 0 .. parts - 1.
        drop_last: See :func:`deal`; needed where ``parts`` is more than 1.
        rank: This process.
        world_size: Number of processes.
        epoch: Passes already made.
        lengths: Of every row: batches are of rows of like length, see :func:`by_length`.

    Raises:
        ValueError: where not even one batch can be filled for every process.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        *,
        seed: int | None = None,
        parts: int = 1,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
        epoch: int = 0,
        lengths: Sequence[int] | None = None,
    ) -> None:
        super().__init__(cast(Any, range(num_rows)), num_replicas=world_size, rank=rank)
        if parts > 1 and not drop_last:
            raise ValueError("parts > 1 slices every batch, so short batches must be dropped.")
        if batch_size < 1 or parts < 1:
            raise ValueError(f"batch_size ({batch_size}) and parts ({parts}) must be at least 1.")
        self.num_rows, self.batch_size, self.order_seed = num_rows, batch_size, seed
        self.parts, self.drop_last, self.world_size = parts, drop_last, world_size
        self.epoch, self.lengths = epoch, lengths
        self.position = 0
        needed = batch_size * parts * world_size if drop_last else 1
        if num_rows < needed:
            raise ValueError(
                f"{num_rows} prompts cannot fill one batch of {batch_size} prompts x {parts} "
                f"rollout batches on each of {world_size} processes ({needed} in all). "
                "Lower batch_size or rollout_batches, or use more data."
            )
        self.pass_length = len(self)
        self._resumed = False

    def keys(self, epoch: int) -> list[BatchKey]:
        """All batches of this process in one pass."""
        if self.order_seed is None:
            order: Sequence[int] = range(self.num_rows)
        else:
            order = row_order(self.num_rows, seed=self.order_seed, epoch=epoch)
            if self.lengths is not None:
                size = self.batch_size * self.parts
                order = by_length(order, self.lengths, size, seed=self.order_seed, epoch=epoch)
        return [
            BatchKey(rows, epoch, part, self.parts, self.batch_size)
            for rows in self._deal(order)
            for part in range(self.parts)
        ]

    def _deal(self, order: Sequence[int]) -> list[tuple[int, ...]]:
        size = self.batch_size * self.parts
        return deal(
            order, size, rank=self.rank, world_size=self.world_size, drop_last=self.drop_last
        )

    def __iter__(self) -> Iterator[BatchKey]:
        return iter(self.keys(self.epoch)[self.position :])

    def __len__(self) -> int:
        return self._num_batches(self.world_size)

    def _num_batches(self, world_size: int) -> int:
        """Batches of one process, if there are ``world_size``."""
        size, rows = self.batch_size * self.parts, range(self.num_rows)
        dealt = deal(rows, size, rank=0, world_size=world_size, drop_last=self.drop_last)
        return len(dealt) * self.parts

    def set_epoch(self, epoch: int) -> None:
        """Ignored: the count of passes is the sampler's own, so that it survives a resume."""

    def limit_pass(self, limit: int | float) -> None:
        """Note that the consumer ends a pass early: after ``limit`` batches, or that share."""
        whole = len(self)
        self.pass_length = min(limit, whole) if isinstance(limit, int) else int(limit * whole)

    def begin_pass(self) -> None:
        """Go to the next pass if this one was begun, unless a resume continues it."""
        unfinished = self._resumed and self.position < self.pass_length
        if self.position > 0 and not unfinished:
            if self.order_seed is not None:
                self.epoch += 1
            self.position = 0
        self._resumed = False

    def state_dict(self) -> dict[str, int]:
        """Pass, position (batches that were taken), batches in a pass; of one of ``processes``."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "length": len(self),
            "processes": self.world_size,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the last batch that was taken, on any number of processes."""
        processes = state.get("processes", self.world_size)
        now = self._num_batches(processes)
        if state["length"] != now:
            warnings.warn(
                f"The run that is resumed had {state['length']} batches in a pass, now there are "
                f"{now}: with other data or batch sizes it does not go on with the prompts that it "
                "had not seen.",
                stacklevel=2,
            )
        self.epoch, self.position = state["epoch"], state["position"]
        if processes != self.world_size:
            taken = self.position // self.parts * processes  # by all of them, in their order
            if taken % self.world_size:
                warnings.warn(
                    f"The run that is resumed had taken {taken} batches; {self.world_size} "
                    "processes cannot share them evenly, so a few prompts of this pass are left "
                    "out.",
                    stacklevel=2,
                )
            self.position = -(-taken // self.world_size) * self.parts
        self._resumed = True


class PromptLoader(DataLoader):
    """A DataLoader over :class:`PromptSampler` keys that resumes where it was.

    Lightning stores ``state_dict()`` in checkpoints and loads it back. The state does not depend
    on the number of workers.
    """

    sampler: PromptSampler

    def __iter__(self) -> Iterator[PromptBatch]:  # type: ignore[override]
        self.sampler.begin_pass()
        for batch in super().__iter__():
            # Before the yield: while a batch is trained on, it counts as taken.
            self.sampler.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The sampler's state."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Load the sampler's state."""
        self.sampler.load_state_dict(state)
