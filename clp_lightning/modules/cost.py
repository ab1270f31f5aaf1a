"""What training has cost, kept in the checkpoint."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ..types import Rollout
from .tally import Tally

__all__ = ["Cost"]

_COUNTS = ("optimizer_steps", "sampled_tokens", "responses", "reward_calls")


class Cost:
    """Counts over all ranks and all resumed parts of a run, and seconds of training.

    A resumed run has the counts of the uninterrupted one. Its seconds are those spent until the
    checkpoint and since. Statistics and fronts are no training: neither their responses nor (for
    fronts) their seconds count.

    Attributes:
        counts: optimizer_steps; sampled_tokens and responses, as sampled for training; and
            reward_calls, responses that were given to rewards, summed over rewards. None if
            training went on from a checkpoint that does not know them.
        wall_s: Seconds of training; None likewise.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] | None = dict.fromkeys(_COUNTS, 0)
        self.wall_s: float | None = 0.0
        self._since: float | None = None

    def count(self, tally: Tally, rollout: Rollout, num_rewards: int) -> None:
        """Adds the responses of one micro-batch, dropped ones too, to the step's ``tally``."""
        tally.count("sampled_tokens", float(rollout.response_mask.sum()))
        tally.count("responses", len(rollout))
        tally.count("reward_calls", len(rollout) * num_rewards)

    def add_step(self, step: dict[str, float]) -> None:
        """Takes its counts out of ``step``, the reduced tally of one optimizer step."""
        found = {"optimizer_steps": 1.0} | {name: step.pop(name) for name in _COUNTS[1:]}
        if self.counts is not None:
            for name, value in found.items():
                self.counts[name] += round(value)

    def start(self) -> None:
        """Starts the clock."""
        self._since = time.monotonic()

    def stop(self) -> None:
        """Stops it; a stopped one stays as it is."""
        if self._since is not None and self.wall_s is not None:
            self.wall_s += time.monotonic() - self._since
        self._since = None

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint; the clock goes on."""
        if self._since is not None:
            self.stop()
            self.start()
        return {"counts": self.counts and dict(self.counts), "wall_s": self.wall_s}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """From ``state_dict``; None (a checkpoint without it) makes everything unknown."""
        state = state or {"counts": None, "wall_s": None}
        self.counts, self.wall_s = state["counts"] and dict(state["counts"]), state["wall_s"]

    def to_dict(self) -> dict[str, float | None]:
        """Counts and seconds by name; None is unknown."""
        counts = self.counts or dict.fromkeys(_COUNTS)
        return {**counts, "wall_s": self.wall_s}
