"""Sampling the responses of a step, and asking the rewards about them ahead of time.

With several chunks the rewards are asked about one, in a thread, while the next is sampled. All
of them come from the same weights, and a token depends on its prompt and sample only, so they are
the responses that would be sampled at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from threading import Event
from typing import TYPE_CHECKING, Any

import torch

from ..attempts import in_thread
from ..rewards.asked import Asked
from ..types import PromptBatch, Rollout

if TYPE_CHECKING:
    from .clp import CLPModule

__all__ = ["Sampled", "check_sampling", "sample"]


def check_sampling(module: CLPModule) -> None:
    """Refuses to fit in a way that would be off-policy, or that cannot be.

    Args:
        module: Its trainer is set up.

    Raises:
        ValueError: says what to change.
    """
    trainer: Any = module.trainer
    batches, chunks = module.rollout_batches, module.rollout_chunks
    if not module.engine.on_policy:
        raise ValueError(
            f"{type(module.engine).__name__} samples from a mixture, not from the policy that is "
            "trained; use it with validate, test and predict, and TransformersEngine in fit."
        )
    if trainer.accumulate_grad_batches % batches:
        raise ValueError(
            f"rollout_batches={batches} must divide accumulate_grad_batches="
            f"{trainer.accumulate_grad_batches}: otherwise a response would be trained "
            "on after the policy that sampled it has moved."
        )
    size = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
    if chunks > 1 and isinstance(size, int) and chunks > size * batches:
        raise ValueError(
            f"rollout_chunks={chunks} is more than the {size * batches} prompts that are sampled "
            f"for a step (batch_size {size} x rollout_batches {batches}), and the responses to a "
            "prompt stay together. Lower rollout_chunks, or raise batch_size."
        )


@dataclass
class Sampled:
    """The responses to a batch of prompts, and what the rewards were asked about them meanwhile.

    Attributes:
        rollout: The responses to all slices of the batch.
        asked: By number of the slice; nothing where the rewards are still to be asked.
    """

    rollout: Rollout
    asked: dict[int, list[Asked]] = field(default_factory=dict)

    def slice(self, batch: PromptBatch, samples: int) -> tuple[Rollout, list[Asked]]:
        """What belongs to the slice of the batch that ``batch`` stands for."""
        asked = self.asked.pop(batch.part, [])
        if batch.parts == 1:
            return self.rollout, asked
        size = _slice_size(batch) * samples
        start = batch.part * size
        rows = torch.arange(start, min(start + size, len(self.rollout)))
        return self.rollout.select(rows), asked


def sample(module: CLPModule, batch: PromptBatch) -> Sampled:
    """Responses to all prompts of ``batch``, by ``module.generate``.

    What is wrong with a reward is told by its answers, later. Where this raises, what runs in the
    background is left behind: it does not keep the process, and nothing new is asked.
    """
    chunks = module.rollout_chunks
    if chunks > 1:  # as many as every device that shares the weights has prompts for
        chunks = min(chunks, -module.policy.most(-len(batch)))
    if chunks == 1:
        return Sampled(module.generate(batch))
    state, stopped = module.trainer_state(), Event()

    def ask(rollout: Rollout, before: Future[Any] | None) -> Asked | None:
        if before is not None:  # one after the other: a reward need not be safe in two threads
            wait([before])
        return None if stopped.is_set() else module.rewards.ask(rollout, state)

    bounds = [len(batch) * i // chunks for i in range(chunks + 1)]
    parts: list[Rollout] = []
    asking: list[tuple[int, Future[Any]]] = []
    try:
        for start, end in pairwise(bounds):
            parts.append(module.generate(batch.select(range(start, end))))
            for number, piece in _pieces(parts[-1], batch, start, end, module.samples_per_prompt):
                before = asking[-1][1] if asking else None
                asking.append((number, in_thread(partial(ask, piece, before))))
        asked: dict[int, list[Asked]] = {}
        for number, future in asking:
            asked.setdefault(number, []).append(future.result())
    except BaseException:  # an interrupt above all
        stopped.set()
        raise
    policy = module.policy
    encoder = policy.model.config.is_encoder_decoder
    rollout = Rollout.cat(parts, pad_id=policy.pad_id, pad_prompts="right" if encoder else "left")
    return Sampled(rollout, asked)


def _slice_size(batch: PromptBatch) -> int:
    """Prompts in a slice."""
    return batch.nominal_size or len(batch) // batch.parts


def _pieces(
    rollout: Rollout, batch: PromptBatch, start: int, end: int, samples: int
) -> Iterator[tuple[int, Rollout]]:
    """The responses to prompts ``start`` to ``end`` by the slice that they will be trained in."""
    if batch.parts == 1:
        yield 0, rollout
        return
    size = _slice_size(batch)
    for number in range(start // size, (end - 1) // size + 1):
        first, last = max(start, number * size) - start, min(end, (number + 1) * size) - start
        yield number, rollout.select(torch.arange(first * samples, last * samples))
