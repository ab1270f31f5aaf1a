"""How the model takes the steps of decoding: as it is, or compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .branches import Branches, reading, worth_branching
from .cache import fix_length, grow_in_place
from .casting import weights_cast
from .policy import Policy
from .prefix import Prefix, extend, run

__all__ = ["CompiledSteps", "Steps", "warn_once"]

# Finished responses are computed along until only this share of the rows is left.
_FEWER = 0.75
# Lengths of a fixed cache are multiples of this: a program is compiled for a length.
_MULTIPLE = 64
# Programs of one engine: for sizes, merged and mixed weights, and the reference.
_PROGRAMS = 64


class Steps:
    """The model's own forward, with a cache that grows in place.

    Long prompts stand in it once for all their responses.

    Args:
        new_tokens: The most tokens of a response.
        dtype: Of the weights that decoding computes with; the policy's own if None.
    """

    def __init__(self, new_tokens: int, dtype: torch.dtype | None = None) -> None:
        self.new_tokens, self.dtype = new_tokens, dtype
        self._cast: dict[Tensor, Tensor] = {}

    @contextmanager
    def rows(self, policy: Policy, index: Tensor) -> Iterator[None]:
        """Opens the preference of a batch whose row b is row ``index[b]`` of the preference."""
        with policy.rows(index):
            if self.dtype is None:
                yield
            else:
                with weights_cast(policy.model, self.dtype, self._cast):
                    yield

    def begin(self, policy: Policy, prefix: Prefix, rows: Tensor) -> Prefix:
        """Where responses begin, those to the prompts at ``rows``; uses up what is given."""
        if worth_branching(policy, prefix, len(rows)):
            prefix.cache = Branches(prefix.cache, prefix.mask)
            return prefix.select(rows)
        prefix = prefix.select(rows)
        grow_in_place(prefix.cache)
        return prefix

    def extend(self, model: PreTrainedModel, prefix: Prefix, tokens: Tensor) -> None:
        """Runs one token of every response, shape (rows, 1)."""
        cache = prefix.cache
        with reading(model, cache) if isinstance(cache, Branches) else nullcontext():
            extend(model, prefix, tokens)

    def kept(self, finished: Tensor) -> Tensor | None:
        """Rows to go on with, of those that are computed; None for all.

        Args:
            finished: Which of them have ended, shape (rows,); not all have.
        """
        left = (~finished).nonzero().squeeze(-1)
        return left if len(left) <= _FEWER * len(finished) else None


class CompiledSteps(Steps):
    """The forward as a compiled program, with a cache of fixed length.

    Finished responses are left out by halves, so that there are few sizes.

    Args:
        new_tokens: The most tokens of a response.
        dtype: As in ``Steps``.
        program: ``prefix.run``, compiled; see ``compile_forward``.
    """

    def __init__(
        self, new_tokens: int, dtype: torch.dtype | None, program: Callable[..., Tensor]
    ) -> None:
        super().__init__(new_tokens, dtype)
        self._program = program

    def begin(self, policy: Policy, prefix: Prefix, rows: Tensor) -> Prefix:
        prefix = prefix.select(rows)
        used = prefix.mask.shape[1]
        length = -(-(used + self.new_tokens) // _MULTIPLE) * _MULTIPLE
        fix_length(prefix.cache, length)
        # Causality hides the tokens to come.
        room = prefix.mask.new_ones(len(rows), length - used)
        prefix.mask, prefix.fixed = torch.cat([prefix.mask, room], dim=-1), True
        return prefix

    def extend(self, model: PreTrainedModel, prefix: Prefix, tokens: Tensor) -> None:
        # The first forward of a scope makes what the others reuse: it is another program.
        extend(model, prefix, tokens, self._program if prefix.begun else None)

    def kept(self, finished: Tensor) -> Tensor | None:
        size, left = len(finished), int((~finished).sum())
        while left <= size // 2:
            size //= 2
        if size == len(finished):
            return None
        # Filled up with finished ones, in the order that they had.
        return finished.long().argsort(stable=True)[:size].sort().values


def compile_forward(backend: str = "inductor") -> Callable[..., Tensor]:
    """``prefix.run``, compiled when it is first called, and again for weights of another kind.

    The second number of rows or length that it meets makes a program for any; where preferences
    are mixed by row, each has its own.

    What needs more programs than there may be is computed without, and a warning says so.

    Raises:
        RuntimeError: when it is called, if the model's forward cannot be compiled.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    make: Any = torch.compile  # its overloads do not name all of its arguments
    compiled = make(
        run, fullgraph=True, backend=backend, isolate_recompiles=True, recompile_limit=_PROGRAMS
    )

    without: set[tuple[torch.Size, ...]] = set()  # sizes; to ask again at every token is slow

    def program(model: PreTrainedModel, **inputs: Any) -> Tensor:
        size = tuple(value.shape for value in inputs.values() if isinstance(value, Tensor))
        if size in without:
            return run(model, **inputs)
        try:
            logits: Tensor = compiled(model, **inputs)
            return logits
        except FailOnRecompileLimitHit:
            without.add(size)
            warn_once(
                f"Decoding has been compiled for {_PROGRAMS} sizes; others are computed without. "
                "Fewer batch sizes and prompt lengths need fewer programs."
            )
            return run(model, **inputs)
        except TorchDynamoException as error:
            raise RuntimeError(
                f"The forward of {type(model).__name__} could not be compiled; use "
                "TransformersEngine(compile=False). On the CPU torch.compile needs a C++ compiler."
            ) from error

    return program


@cache
def warn_once(message: str) -> None:
    """A warning that is not given again, whoever asks."""
    warnings.warn(message, stacklevel=4)
