"""Calling a reward as TRL does, and checking what it returns."""

from __future__ import annotations

import asyncio
import inspect
import math
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ..attempts import attempt, attempt_awaitable, failed, in_thread

__all__ = ["Call", "Late", "Problem", "Samples", "same", "start"]

Samples = dict[str, list[Any]]
"""Keyword arguments of a reward that are lists with one entry per response."""


class Problem(Exception):
    """What a reward did wrong.

    Attributes:
        row: The response concerned, where that is known.
        scores: One per response where it is known on which ones the reward failed: None there.
    """

    scores: list[float | None] | None = None

    def __init__(self, what: str, row: int | None = None) -> None:
        super().__init__(what)
        self.row = row


class Late(Problem):
    """A reward did not answer within its time limit."""


@dataclass
class Call:
    """One reward called on some responses; asynchronous ones run until ``scores`` is asked for.

    Attributes:
        given: What it was called on.
        copy: What it got.
        outcome: Waits for what it comes to.
    """

    given: Samples
    copy: Samples
    outcome: Callable[[], Future[Any]]

    def scores(self) -> list[float]:
        """One number per response, NaN where the reward returned None.

        Raises:
            Problem: the reward failed or returned what is no score.
        """
        returned = self._checked(self.outcome())
        for name, values in self.given.items():
            if not same(self.copy[name], values):
                raise Problem(f"changed the list '{name}' that it was given; let it copy first")
        if hasattr(returned, "tolist"):
            returned = self._checked(attempt(returned.tolist))
        if not isinstance(returned, (list, tuple)):
            raise Problem(f"returned a {type(returned).__name__}, not a list of scores")
        expected = len(self.given["completions"])
        if len(returned) != expected:
            raise Problem(f"returned {len(returned)} scores for {expected} completions")
        scores: list[float | None] = []
        first: Problem | None = None
        for row, value in enumerate(returned):
            try:
                scores.append(_number(value, row))
            except Problem as problem:  # the first is told, all are left out
                first = first or problem
                scores.append(None)
        if first is not None:
            first.scores = scores
            raise first
        return [score for score in scores if score is not None]

    def _checked(self, outcome: Future[Any]) -> Any:
        error = outcome.exception()
        if isinstance(error, Late):
            raise error
        if error is not None:
            why = f"raised {type(error).__name__}: {error}{self._hint(error)}"
            raise Problem(why) from error
        return outcome.result()

    def _hint(self, error: BaseException) -> str:
        chat = any(isinstance(completion, list) for completion in self.given["completions"])
        if chat and isinstance(error, (AttributeError, TypeError)):
            return " (prompts and completions are lists of messages here)"
        return ""


def start(
    function: Callable[..., Any],
    samples: Samples,
    context: dict[str, Any],
    timeout: float | None = None,
) -> Call:
    """Call ``function(**samples, **context)``; a coroutine starts to run in the background.

    Args:
        function: The reward.
        samples: Its lists, of which it gets copies.
        context: Its other keyword arguments.
        timeout: Seconds that it may take. What takes longer is left behind: nothing can end a
            thread from outside.
    """
    copy = {name: _copy(values) for name, values in samples.items()}
    begun = time.monotonic()

    def call() -> Any:
        return function(**copy, **context)

    outcome = attempt(call) if timeout is None else _in_time(in_thread(call), begun, timeout)
    if outcome.exception() is None and inspect.isawaitable(returned := outcome.result()):
        answer: Future[Any] = Future()
        task = asyncio.run_coroutine_threadsafe(
            attempt_awaitable(answer, returned), _event_loop(os.getpid())
        )
        return Call(samples, copy, lambda: _in_time(answer, begun, timeout, task))
    return Call(samples, copy, lambda: outcome)


def _in_time(
    future: Future[Any], begun: float, timeout: float | None, task: Future[None] | None = None
) -> Future[Any]:
    """``future`` once it is settled; or one of ``Late``, ``timeout`` seconds after ``begun``.

    A TimeoutError is the reward's own. ``task`` is what settles it, and is given up then.
    """
    left = None if timeout is None else max(0.0, begun + timeout - time.monotonic())
    wait([future], left)
    if future.done():
        return future
    if task is not None:
        task.cancel()
    return failed(Late(f"did not answer within {timeout:g} s"))


# One loop for all calls, because HTTP clients belong to the loop that they were first used in; in
# a thread, because a notebook's own loop is running already. By process, because threads do not
# survive a fork.
@cache
def _event_loop(process: int) -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop


def _number(value: Any, row: int) -> float:
    if value is None:
        return math.nan
    if isinstance(value, Exception):
        raise Problem(f"failed with {type(value).__name__}: {value}", row)
    if hasattr(value, "item"):  # a scalar of torch or numpy
        item = attempt(value.item)
        if (error := item.exception()) is not None:
            raise Problem(f"returned a {type(value).__name__} that is no number: {error}", row)
        value = item.result()
    if not isinstance(value, (int, float)):
        raise Problem(f"returned {value!r}, which is no number", row)
    try:
        number = float(value)
    except OverflowError:  # a Python integer beyond float
        number = math.inf if value > 0 else -math.inf
    if not abs(number) <= _LARGEST:
        raise Problem(
            f"returned {number} (not finite in float32; None is the way to give no score)", row
        )
    return number


_LARGEST = torch.finfo(torch.float32).max
_PLAIN = (str, int, float, type(None))  # most of what there is: spared the call


def _copy(value: Any) -> Any:
    """A copy of nested lists and dicts; what they hold is shared."""
    if isinstance(value, list):
        return [item if type(item) in _PLAIN else _copy(item) for item in value]
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return value


def same(copy: Any, value: Any) -> bool:
    """Whether ``_copy(value)`` still holds what ``value`` holds."""
    if isinstance(value, list):
        same_length = isinstance(copy, list) and len(copy) == len(value)
        return same_length and all(
            one is other or same(one, other) for one, other in zip(copy, value, strict=True)
        )
    if isinstance(value, dict):
        same_keys = isinstance(copy, dict) and copy.keys() == value.keys()
        return same_keys and all(same(copy[key], value[key]) for key in value)
    return copy is value
