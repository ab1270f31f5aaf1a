"""Prompt-CLP on the exact task: the preference in the task's own tokens."""

from __future__ import annotations

from collections.abc import Sequence

from ..conditioning import Conditioner, PromptText
from .task import ExactTask

__all__ = ["ExactPromptText"]

_DIGITS = 2


class ExactPromptText(PromptText):
    """Writes every weight but the last, and alpha, as two digits in front of the prompt.

    The digits are the V tokens that may stand in a prompt, so a number is written in steps of
    1 / (V^2 - 1).

    Args:
        task: The same as the data's.
        rest: What is trained; every parameter if None.
    """

    def __init__(self, task: ExactTask, rest: Conditioner | None = None) -> None:
        super().__init__(rest=rest)
        # The stop token may not stand in a prompt.
        self._digits = task.tokens[: task.num_letters]

    def text(self, weights: Sequence[float], alpha: float) -> str:
        return "".join(f"{digit} " for x in [*weights[:-1], alpha] for digit in self._write(x))

    def _write(self, value: float) -> list[str]:
        base = len(self._digits)
        number = round(value * (base**_DIGITS - 1))
        return [self._digits[number // base], self._digits[number % base]]
