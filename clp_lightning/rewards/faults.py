"""What is done about a reward that fails: it is asked again, then stops the run or loses rows."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from .base import RewardError
from .calling import Call, Late, Problem, Samples, start

__all__ = ["FaultPolicy", "OnError"]

OnError = Literal["raise", "drop"]
_LONGEST_WAIT = 60.0  # seconds between two tries
_LONGEST_LIMIT = 1e9  # seconds; more overflows the system's clock


@dataclass
class FaultPolicy:
    """How rewards are called, and what follows where one fails.

    Args:
        on_reward_error: What a fault comes to in the end: ``raise`` stops the run, ``drop`` leaves
            the responses concerned out.
        reward_retries: How often a reward that failed is asked again before that.
        reward_retry_wait: Seconds before it is asked again; twice as long each time, up to 60.
        reward_timeout: Seconds that a call of a reward may take; no limit if None.

    Raises:
        ValueError: an argument is out of range.
    """

    on_reward_error: OnError = "raise"
    reward_retries: int = 0
    reward_retry_wait: float = 1.0
    reward_timeout: float | None = None
    _told: set[str] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.on_reward_error not in get_args(OnError):
            raise ValueError(
                f"on_reward_error is 'raise' or 'drop', not '{self.on_reward_error}'. To ask a "
                "failing reward again, set reward_retries."
            )
        if not isinstance(self.reward_retries, int) or self.reward_retries < 0:
            raise ValueError(
                f"reward_retries is a whole number, 0 or more; got {self.reward_retries}."
            )
        if not 0 <= self.reward_retry_wait < math.inf:
            raise ValueError(
                f"reward_retry_wait must be finite and 0 or more; got {self.reward_retry_wait}."
            )
        if self.reward_timeout is not None and not self.reward_timeout > 0:
            raise ValueError(
                f"reward_timeout is a number of seconds above 0; got {self.reward_timeout}. Leave "
                "it out for no limit."
            )

    def call(self, reward: Callable[..., Any], samples: Samples, context: dict[str, Any]) -> Call:
        """Starts ``reward`` on ``samples``."""
        return start(reward, samples, context, self._limit)

    @property
    def _limit(self) -> float | None:
        """The time limit, if it is one that a thread can wait for."""
        limit = self.reward_timeout
        return None if limit is None or limit > _LONGEST_LIMIT else limit

    def recover(
        self,
        name: str,
        reward: Callable[..., Any],
        problem: Problem,
        samples: Samples,
        context: dict[str, Any],
    ) -> list[float | None]:
        """One score per response after ``problem``; None marks a dropped one.

        Raises:
            RewardError: naming reward, prompt and completion, if ``on_reward_error`` is ``raise``.
        """
        self._tell(name, problem)
        rows = list(range(len(samples["completions"])))
        scores = [*(problem.scores or [None] * len(rows))]
        missing = [row for row in rows if scores[row] is None]
        wait = self.reward_retry_wait
        for _ in range(self.reward_retries):
            time.sleep(min(wait, _LONGEST_WAIT))
            wait = min(2 * wait, _LONGEST_WAIT)
            again: list[float | None]
            try:
                again = [*self.call(reward, _at(samples, missing), context).scores()]
            except Problem as another:
                problem = another
                problem.row = None if problem.row is None else missing[problem.row]
                again = problem.scores or [None] * len(missing)
            for row, score in zip(missing, again, strict=True):
                scores[row] = score
            missing = [row for row in missing if scores[row] is None]
            if not missing:
                return scores
        if self.on_reward_error == "raise":
            raise self._error(name, reward, problem, samples, context) from problem
        if problem.scores is None and not isinstance(problem, Late):
            alone = self._alone(reward, samples, missing, context)
            good = [row for row, found in alone if found is None]
            together = self._together(reward, samples, good, context)
            for row, score in zip(good, together, strict=True):
                scores[row] = score
        return scores

    def _alone(
        self, reward: Callable[..., Any], samples: Samples, rows: list[int], context: dict[str, Any]
    ) -> Iterator[tuple[int, Problem | None]]:
        """What is wrong with each of ``rows``, up to the first that takes too long."""
        for row in rows:
            try:
                self.call(reward, _at(samples, [row]), context | _SILENT).scores()
            except Problem as problem:
                yield row, problem
                if isinstance(problem, Late):
                    return
            else:
                yield row, None

    def _together(
        self, reward: Callable[..., Any], samples: Samples, rows: list[int], context: dict[str, Any]
    ) -> list[float | None]:
        """What can be scored, scored again: a score may depend on its siblings."""
        if not rows:
            return []
        try:
            scores = self.call(reward, _at(samples, rows), context | _SILENT).scores()
        except Problem:
            return [None] * len(rows)
        return [*scores]

    def _error(
        self,
        name: str,
        reward: Callable[..., Any],
        problem: Problem,
        samples: Samples,
        context: dict[str, Any],
    ) -> RewardError:
        row = problem.row
        if row is None and not isinstance(problem, Late):
            # Which response it was shows when each is scored alone; else it is the whole batch.
            alone = self._alone(reward, samples, [*range(len(samples["prompts"]))], context)
            row = next((row for row, found in alone if found is not None), None)
        tries = f", {self.reward_retries + 1} times in a row" if self.reward_retries else ""
        return RewardError(
            f"Reward '{name}' {problem}{tries}.{_rank()} Prompt: "
            f"{_short(samples['prompts'][row or 0])} "
            f"Completion: {_short(samples['completions'][row or 0])}"
        )

    def _tell(self, name: str, problem: Problem) -> None:
        """Warns of the first fault that does not stop the run at once."""
        if name in self._told or (self.on_reward_error == "raise" and not self.reward_retries):
            return
        self._told.add(name)
        again = f"is asked again up to {self.reward_retries} times" if self.reward_retries else ""
        end = (
            "then stops the run"
            if self.on_reward_error == "raise"
            else "loses the responses concerned"
        )
        warnings.warn(
            f"Reward '{name}' {problem}. It {' and '.join(filter(None, [again, end]))}. Faults "
            "that depend on the response bias what is learnt. This is said once.",
            stacklevel=4,
        )


def _at(samples: Samples, rows: list[int]) -> Samples:
    return {name: [values[row] for row in rows] for name, values in samples.items()}


def _rank() -> str:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return f" On rank {torch.distributed.get_rank()}." if distributed else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "…"


def _ignore(*_: Any) -> None:
    pass


_SILENT = {"log_extra": _ignore, "log_metric": _ignore}  # what was asked twice is not logged twice
