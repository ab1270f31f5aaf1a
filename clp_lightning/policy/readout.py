"""What is read off the logits, and output layers that are applied to few positions at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..conditioning.forwards import forwards_replaced

__all__ = ["InPieces", "Readout", "can_be_cut"]

OfLogits = Callable[[Tensor, Tensor], Tensor]
"""What is wanted of logits (B, t, V) and the tokens (B, t) that followed: shape (B, t, ...)."""


class Readout:
    """Reads what is wanted off a model's logits.

    Args:
        of_logits: Turns logits (B, t, V) and the tokens (B, t) that followed into (B, t, ...).
    """

    def __init__(self, of_logits: OfLogits) -> None:
        self.of_logits = of_logits

    def model_runs(self) -> AbstractContextManager[None]:
        """Opened around the model's forward."""
        return nullcontext()

    def __call__(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """What is wanted, shape (B, t, ...), of what the forward returned, (B, t, V)."""
        return self.of_logits(logits, tokens)


class InPieces(Readout):
    """The same without ever holding the logits of all positions.

    The forward ends before the output layer, which then reads a few positions at a time; the
    backward pass computes each piece's logits again.

    Args:
        of_logits: As in ``Readout``.
        head: The output layer; the last thing that the model does, see ``can_be_cut``.
        positions: In a piece, for every row.
        context_fn: Of torch.utils.checkpoint: opens the preference for the recomputation.
    """

    def __init__(
        self, of_logits: OfLogits, head: nn.Module, positions: int, context_fn: Callable[[], Any]
    ) -> None:
        super().__init__(of_logits)
        self.head, self.positions, self.context_fn = head, positions, context_fn
        self._dtype: torch.dtype

    def model_runs(self) -> AbstractContextManager[None]:
        return forwards_replaced({self.head: self._noted})

    def _noted(self, states: Tensor) -> Tensor:
        self._dtype = states.dtype  # some models go on in float32
        return states

    def __call__(self, logits: Tensor, tokens: Tensor) -> Tensor:
        # They are the states before the output layer, (B, t, d).
        pieces = zip(logits.split(self.positions, 1), tokens.split(self.positions, 1), strict=True)
        return torch.cat([self._read(*piece) for piece in pieces], dim=1)

    def _read(self, states: Tensor, tokens: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self._of_states(states, tokens)
        read: Tensor = checkpoint(
            self._of_states, states, tokens, use_reentrant=False, context_fn=self.context_fn
        )
        return read

    def _of_states(self, states: Tensor, tokens: Tensor) -> Tensor:
        return self.of_logits(self.head(states.to(self._dtype)), tokens)


@torch.no_grad()
def can_be_cut(model: PreTrainedModel, run: Callable[[], Tensor]) -> bool:
    """Whether the logits of ``model`` are what its output layer returns, and nothing follows.

    Some families cap or scale their logits behind it, or add a bias.

    Args:
        model: The model.
        run: Its forward on anything; returns logits, (..., V).
    """
    head: Any = model.get_output_embeddings()
    if head is None:
        return False
    width = getattr(head, "out_features", model.config.get_text_config().vocab_size)
    # A bias of 0, which may be trained, shows in another width; a vocabulary cut off, in its own.
    return all(_says(head, run, columns) for columns in (8, width))


def _says(head: nn.Module, run: Callable[[], Tensor], columns: int) -> bool:
    """Whether logits are what the output layer would return, so many of them."""
    # A cap bends it, a scale stretches it; every precision holds what bfloat16 does.
    probe = torch.linspace(-50, 50, columns).bfloat16()

    def probed(states: Tensor) -> Tensor:
        return probe.to(states).expand(*states.shape[:-1], -1)

    try:
        with forwards_replaced({head: probed}):
            logits = run()
        return torch.equal(logits, probe.to(logits).expand_as(logits))
    except (RuntimeError, IndexError):  # what follows wants something else
        return False
