"""A remote language model as a reward: it reads a rubric and answers with a score."""

from __future__ import annotations

import warnings
from typing import Any, Literal

from ..described import check_choice
from ..types import Prompt
from .base import Completion, Reward
from .endpoint import Endpoint, NoAnswer
from .rubric import as_text, compile_pattern, fill, placeholders, read_answer

__all__ = ["Judge"]

SCORE = r"(?i)score:[\s*]*(-?\d+(?:\.\d+)?)[\s*.]*$"
"""The answer ends in ``Score: N``, which may be in bold."""


class Judge(Reward):
    """The score that a language model gives under a rubric.

    Args:
        endpoint: The model that judges.
        rubric: What it is asked. ``{prompt}``, ``{completion}`` and any ``{column}`` of the data
            are replaced; ``{completion}`` must occur. Say which scores there are, and that the
            answer ends in ``Score: N``.
        low: Least score that there is.
        high: Largest score that there is.
        pattern: A regular expression whose one group holds the score. Several matches must agree.
        on_fault: What a response without a usable answer is: ``raise`` makes it an error of this
            reward (see the module's ``on_reward_error``), ``none`` leaves it without a score and
            warns. It is never a number.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        rubric: str,
        low: float = 1.0,
        high: float = 10.0,
        pattern: str = SCORE,
        on_fault: Literal["raise", "none"] = "raise",
    ) -> None:
        if not low < high:
            raise ValueError(f"Judge needs low < high; got {low}, {high}.")
        names = placeholders(rubric)
        if "completion" not in names:
            raise ValueError("The rubric must contain {completion}, or nothing would be judged.")
        self.endpoint, self.rubric = endpoint, rubric
        self.low, self.high = low, high
        self.pattern = compile_pattern(pattern)
        self.on_fault = check_choice("on_fault", on_fault, ["raise", "none"])
        self.required_columns = tuple(n for n in names if n not in ("prompt", "completion"))

    def check(self) -> None:
        """Ask for the client, the key and the server (see :meth:`Endpoint.check`)."""
        self.endpoint.check()

    async def __call__(
        self, prompts: list[Prompt], completions: list[Completion], **columns: Any
    ) -> list[float | Exception | None]:
        """A number in [low, high] per completion; None where a column of the rubric is None."""
        own = {name: columns[name] for name in self.required_columns}
        texts = {"prompt": prompts, "completion": completions, **own}
        rows = [dict(zip(texts, row, strict=True)) for row in zip(*texts.values(), strict=True)]
        asked = {
            row: fill(self.rubric, {name: as_text(value) for name, value in values.items()})
            for row, values in enumerate(rows)
            if all(value is not None for value in values.values())
        }
        answers = await self.endpoint.ask([*asked.values()], self.read)
        scores: list[float | Exception | None] = [None] * len(rows)
        for row, answer in zip(asked, answers, strict=True):
            scores[row] = answer
        return scores if self.on_fault == "raise" else _unscored(scores)

    def read(self, answer: str) -> float:
        """The score in what the model wrote.

        Raises:
            ValueError: there is none, there are several, or it is out of range.
        """
        score = read_answer(answer, self.pattern, float)
        if not self.low <= score <= self.high:
            raise ValueError(f"the score {score:g} is not in [{self.low:g}, {self.high:g}]")
        return score


def _unscored(scores: list[float | Exception | None]) -> list[float | Exception | None]:
    faults = [score for score in scores if isinstance(score, NoAnswer)]
    if faults:
        warnings.warn(
            f"{len(faults)} of {len(scores)} responses are left without a score: {faults[0]}",
            stacklevel=2,
        )
    return [None if isinstance(score, NoAnswer) else score for score in scores]
