"""The Reward interface, which is TRL's, and the wrapper that makes one of any function."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import torch

from ..described import Described, load_object
from ..types import REWARD_ARGUMENTS, Message, Prompt

__all__ = ["Completion", "Function", "Reward", "RewardError", "Unavailable", "completion_text"]

Completion = str | list[Message]
"""A completion is a plain string, or a list of one assistant message."""


class RewardError(ValueError):
    """A reward failed or returned what is no score; names reward, prompt and completion."""


class Reward(Described, ABC):
    """Scores completions.

    Attributes:
        required_columns: Columns of the data that it cannot do without.
    """

    required_columns: tuple[str, ...] = ()

    @abstractmethod
    def __call__(
        self, prompts: list[Prompt], completions: list[Any], **columns: Any
    ) -> Sequence[float | Exception | None] | Awaitable[Sequence[float | Exception | None]]:
        """One score per completion.

        Args:
            prompts: B strings or message lists.
            completions: B strings; where the prompts are conversations, B lists of one message.
            columns: Every other column of the data, lists of length B, and, as in TRL,
                ``completion_ids`` (the stop token included), ``trainer_state``,
                ``log_extra(column, values)`` and ``log_metric(name, value)``.

        Returns:
            A list of B numbers; None where it does not apply, an exception where it failed on that
            completion alone. A coroutine is awaited.
        """

    def check(self) -> None:
        """Raise now what would fail at the first call, as far as it is cheap to know."""

    def place(self, device: torch.device) -> None:
        """Told the device of the policy before every call; a head may load its model there."""


class Function(Reward):
    """Any reward written for TRL.

    Args:
        function: A function, partial, instance with ``__call__`` or coroutine function with
            TRL's signature, or the import path of one. It must accept ``**kwargs``.
        kwargs: Further keyword arguments of every call.
        factory: ``function(**kwargs)`` is called once and makes the reward, as
            ``trl.rewards.get_soft_overlong_punishment`` does.

    Raises:
        ValueError: where the path cannot be imported or the function refuses keywords.
    """

    def __init__(
        self,
        function: Callable[..., Any] | str,
        kwargs: dict[str, Any] | None = None,
        factory: bool = False,
    ) -> None:
        self.function: Callable[..., Any] = (
            load_object(function) if isinstance(function, str) else function
        )
        if not callable(self.function):
            raise ValueError(f"{function!r} is not a function.")
        if isinstance(self.function, type) and not factory:
            raise ValueError(
                f"{function!r} is a class: give an instance, or set factory=true with its kwargs."
            )
        self.kwargs = dict(kwargs or {})
        if factory:
            self.function, self.kwargs = self.function(**self.kwargs), {}
        parameters = _parameters(self.function)
        if parameters is not None:
            if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                raise ValueError(
                    f"The reward {function!r} must accept **kwargs: like TRL's it is called with "
                    f"{', '.join(sorted(REWARD_ARGUMENTS))} and every column of the data."
                )
            self.required_columns = tuple(
                name
                for name, p in parameters.items()
                if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
                and p.default is p.empty
                and name not in {*REWARD_ARGUMENTS, *self.kwargs}
            )

    def __call__(self, prompts: list[Prompt], completions: list[Any], **columns: Any) -> Any:
        """The function's own scores."""
        return self.function(
            **{"prompts": prompts, "completions": completions, **columns, **self.kwargs}
        )


class Unavailable(Reward):
    """Stands in a checkpoint for a reward without an import path, such as a lambda.

    Args:
        name: Name of the reward.

    Raises:
        ValueError: always; it says that the reward must be passed again.
    """

    def __init__(self, name: str) -> None:
        raise ValueError(
            f"Reward '{name}' was a lambda or an object that cannot be imported by name, so the "
            "checkpoint does not hold it. Pass all rewards again: "
            "load_from_checkpoint(path, rewards={...}). Commands need rewards with an import path."
        )

    def __call__(self, prompts: list[Prompt], completions: list[Any], **columns: Any) -> Any:
        raise NotImplementedError


def completion_text(completion: Completion) -> str:
    """The text of a completion, plain or a list of messages.

    Example:
        >>> completion_text([{"role": "assistant", "content": "Yes."}])
        'Yes.'
    """
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message.get("content") or "") for message in completion)


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None  # some built-in functions do not tell
