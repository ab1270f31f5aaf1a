"""K named rewards, called as TRL calls them, and their frozen statistics."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..described import settings
from ..types import Rollout
from .asked import Asked, joined_extra, mean_metrics, same_samples
from .base import Function, Reward
from .calling import Problem, Samples
from .faults import FaultPolicy, OnError

__all__ = ["RewardBank", "Scores", "check_reward_name"]


def check_reward_name(name: object) -> None:
    """Refuses what could not be part of a metric's, a module's or a folder's name.

    Raises:
        ValueError: says what a name may consist of.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"{name!r} cannot be the name of a reward: use letters, digits, _ and -.")


@dataclass
class Scores:
    """What K rewards say about B responses.

    Attributes:
        raw: Float32, shape (B, K); NaN where a reward gave no score.
        kept: False where a response was dropped because a reward failed on it, shape (B,).
    """

    raw: Tensor
    kept: Tensor

    def select(self, rows: Tensor) -> Scores:
        """The scores at ``rows``, an index or a mask."""
        return Scores(self.raw[rows], self.kept[rows])

    @classmethod
    def nothing(cls, rows: int, num_rewards: int, device: torch.device) -> Scores:
        """Of ``rows`` responses that were all dropped."""
        raw = torch.full((rows, num_rewards), math.nan, device=device)
        return cls(raw, torch.zeros(rows, dtype=torch.bool, device=device))


class RewardBank(nn.Module):
    """Scores rollouts under K rewards and normalises the scores.

    Statistics are buffers, so they are in every checkpoint; the rewards themselves are not.

    Args:
        rewards: Name to a :class:`Reward`, a function with TRL's signature, or the import path of
            one.
        statistics: Name to mean and standard deviation, to set them by hand.
        std_floor: Least standard deviation to divide by, of all rewards or by name; 1e-3 for
            those not named.
        on_reward_error: What a failing reward does: ``raise`` stops the run, ``drop`` leaves the
            responses concerned out and counts them in ``dropped``.
        reward_retries: How often a failing reward is asked again before that.
        reward_retry_wait: Seconds before it is asked again; twice as long each time, up to 60.
        reward_timeout: Seconds that a call of a reward may take, each try apart; no limit if None.

    Attributes:
        names: Names of the rewards; the order of every K axis.
        mean: Mean of each raw reward, shape (K,).
        std: Standard deviation to divide by, shape (K,).
        fitted: Whether ``mean`` and ``std`` are set.
        metrics: What the rewards of the last call reported with ``log_metric``, averaged.
        extra: Columns that they reported with ``log_extra``.
        dropped: Responses left out so far.
        problems: Name of each reward that failed to what it did wrong last.

    Raises:
        ValueError: no reward, a bad name, statistics or floors of unknown rewards.
    """

    mean: Tensor
    std: Tensor
    fitted: Tensor

    def __init__(
        self,
        rewards: Mapping[str, Reward | Callable[..., Any] | str],
        statistics: Mapping[str, Sequence[float]] | None = None,
        std_floor: float | Mapping[str, float] = 1e-3,
        on_reward_error: OnError = "raise",
        reward_retries: int = 0,
        reward_retry_wait: float = 1.0,
        reward_timeout: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(rewards, Mapping):
            raise ValueError(
                f"rewards is a {type(rewards).__name__}; name each reward: "
                "rewards={'brevity': Brevity()}."
            )
        if not rewards:
            raise ValueError("There is no reward; name at least one.")
        for name in rewards:
            check_reward_name(name)
        if len({name.casefold() for name in rewards}) < len(rewards):
            raise ValueError(
                f"Some of {[*rewards]} differ in upper and lower case only, but each has a folder "
                "of its name in a saved policy; rename one."
            )
        self.faults = FaultPolicy(
            on_reward_error, reward_retries, reward_retry_wait, reward_timeout
        )
        # A plain dict: heads are frozen and stay out of parameters, state and train().
        self.rewards = {name: _as_reward(name, reward) for name, reward in rewards.items()}
        self.names = list(self.rewards)
        self.statistics = self._by_name("statistics", statistics or {})
        floors = std_floor if isinstance(std_floor, Mapping) else dict.fromkeys(rewards, std_floor)
        self.std_floor = dict.fromkeys(self.names, 1e-3) | self._by_name("std_floor", floors)
        if not all(0 < floor < math.inf for floor in self.std_floor.values()):
            raise ValueError(f"std_floor must be above 0 and finite; got {self.std_floor}.")
        for name, (mean, std) in self.statistics.items():
            if not (math.isfinite(mean) and 0 < std < math.inf):
                raise ValueError(f"statistics of '{name}' must be a mean and a deviation above 0.")
        pairs = [self.statistics.get(name, (0.0, 1.0)) for name in self.names]
        self.register_buffer("mean", torch.tensor([pair[0] for pair in pairs]))
        self.register_buffer("std", torch.tensor([pair[1] for pair in pairs]))
        self.register_buffer("fitted", torch.tensor(len(self.statistics) == len(self.names)))
        self.metrics: dict[str, float] = {}
        self.extra: dict[str, list[Any]] = {}
        self.dropped = 0
        self.problems: dict[str, str] = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the statistics, but never to half precision, which would change the objective."""
        exact = {"mean": self.mean, "std": self.std}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = getattr(self, name)
            if after.dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, before.to(after.device))
        return self

    def settings(self) -> dict[str, dict[str, Any] | None]:
        """How each reward was made, to compare; None where a part of it has no description."""
        return {name: _settings(reward) for name, reward in self.rewards.items()}

    def check_columns(self, columns: Collection[str]) -> None:
        """Refuse, before anything is loaded, data or models that the rewards cannot work with.

        Raises:
            ValueError: naming a reward and the columns that it misses.
            FileNotFoundError: naming a head's model that is nowhere.
        """
        for name, reward in self.rewards.items():
            reward.check()
            missing = [column for column in reward.required_columns if column not in columns]
            if missing:
                raise ValueError(
                    f"Reward '{name}' needs the columns {missing}; the data has: "
                    f"{', '.join(sorted(columns)) or 'none'}. Rename one with the data's "
                    "`columns`, or tell the reward another name."
                )

    def forward(self, rollout: Rollout, trainer_state: Any = None) -> Scores:
        """Raw scores of every response.

        Args:
            rollout: B responses.
            trainer_state: Handed to the rewards; TRL's have ``global_step``, ``max_steps`` and
                ``epoch``.

        Raises:
            RewardError: naming reward, prompt and completion; not where faults drop responses.
        """
        return self.answers([self.ask(rollout, trainer_state)])

    def ask(self, rollout: Rollout, trainer_state: Any = None) -> Asked:
        """Calls every reward; ``answers`` says what came of it.

        Coroutines go on in the background, side by side. What fails is told by ``answers``.
        """
        asked = Asked(_samples(rollout))
        state = trainer_state or SimpleNamespace(global_step=0, max_steps=0, epoch=0)
        asked.context = {
            "trainer_state": state,
            "log_extra": lambda column, values: asked.extra.update({column: list(values)}),
            "log_metric": lambda name, value: asked.metrics[name].append(float(value)),
        }
        for reward in self.rewards.values():
            reward.place(self.mean.device)
        for reward in self.rewards.values():
            asked.calls.append(self.faults.call(reward, asked.samples, asked.context))
        return asked

    def answers(self, asked: Sequence[Asked]) -> Scores:
        """Raw scores of all that was ``asked``, in its order; everything else as of one call.

        Raises:
            RewardError: as ``forward``.
        """
        columns: list[list[float | None]] = []
        for k, (name, reward) in enumerate(self.rewards.items()):
            columns.append([])
            for part in asked:
                try:
                    columns[k] += part.calls[k].scores()
                except Problem as problem:
                    self.problems[name] = str(problem)
                    given = part.samples, part.context
                    columns[k] += self.faults.recover(name, reward, problem, *given)
        kept = [None not in scores for scores in zip(*columns, strict=True)]
        self.metrics, self.extra = mean_metrics(asked), joined_extra(asked)
        self.dropped += kept.count(False)
        numbers = [[math.nan if score is None else score for score in row] for row in columns]
        raw = torch.tensor(numbers, dtype=torch.float32).T
        return Scores(raw.to(self.mean.device), torch.tensor(kept, device=self.mean.device))

    @staticmethod
    def are_about(asked: Sequence[Asked], rollout: Rollout) -> bool:
        """Whether ``asked`` is what the rewards would now be asked about ``rollout``."""
        return same_samples(asked, _samples(rollout))

    @torch.no_grad()
    def fit(self, raw: Tensor) -> None:
        """Freeze mean and standard deviation, except those set by hand.

        Args:
            raw: Raw scores of reference responses, shape (N, K); NaN where there is none.

        Raises:
            ValueError: naming a reward without any score.
        """
        for k, name in enumerate(self.names):
            if name in self.statistics:
                continue
            scores = raw[:, k].double()
            scores = scores[~scores.isnan()]
            if len(scores) == 0:
                why = "it returned None each time); look at the columns that it reads."
                if name in self.problems:
                    why = f"the last time it {self.problems[name]})."
                raise ValueError(
                    f"Reward '{name}' scored none of {len(raw)} reference responses ({why}"
                )
            std, floor = float(scores.std(correction=0)), self.std_floor[name]
            if std < floor:
                warnings.warn(
                    f"Reward '{name}' hardly varies over the reference's responses: its standard "
                    f"deviation {std:.3g} is under the floor {floor:.3g}, by which it is divided "
                    "instead. Is it the right reward, on the right scale?",
                    stacklevel=2,
                )
            self.mean[k], self.std[k] = scores.mean(), max(std, floor)
        self.fitted.fill_(True)

    @torch.no_grad()
    def leave_raw(self) -> None:
        """Freeze mean 0 and deviation 1, except those set by hand."""
        self.fitted.fill_(True)

    def normalize(self, raw: Tensor) -> Tensor:
        """``(raw - mean) / std``, shape (B, K).

        Raises:
            RuntimeError: before the statistics are set.
        """
        if not self.fitted:
            raise RuntimeError(
                "The rewards have no statistics yet. Call fit() with scores of the reference's "
                "responses (training does it at its start), set `statistics`, or load a checkpoint."
            )
        return (raw - self.mean) / self.std

    def _by_name(self, argument: str, values: Mapping[str, Any]) -> dict[str, Any]:
        unknown = [name for name in values if name not in self.names]
        if unknown:
            raise ValueError(f"{argument} names {unknown}; the rewards are {self.names}.")
        return dict(values)


def _as_reward(name: str, reward: Reward | Callable[..., Any] | str) -> Reward:
    if isinstance(reward, Reward):
        return reward
    if isinstance(reward, str) or callable(reward):
        return Function(reward)
    raise ValueError(
        f"Reward '{name}' is a {type(reward).__name__}; give a Reward, a function or the import "
        "path of one."
    )


def _settings(reward: Reward) -> dict[str, Any] | None:
    try:
        found = settings(reward)
    except (TypeError, ValueError):
        return None
    unknown = isinstance(reward, Function) and found["init_args"]["function"] is None
    return None if unknown else found


def _samples(rollout: Rollout) -> Samples:
    completions: list[Any] = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(rollout.prompts, rollout.completions, strict=True)
    ]
    lengths = rollout.lengths.tolist()
    ids = [row[:length] for row, length in zip(rollout.response_ids.tolist(), lengths, strict=True)]
    given = {"prompts": rollout.prompts, "completions": completions, "completion_ids": ids}
    return given | rollout.columns
