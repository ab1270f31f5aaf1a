"""Rewards that fail at random, whatever the response: every policy keeps its promise.

Seen on the exact task, where the gradient is known: what ``drop`` and retries leave of a step
points along the gradient of V, with its length.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clp_lightning import CLPModule, ExactTask, Reward
from clp_lightning.rewards import RewardError
from tests.exact.test_gradient import PASSES, SAMPLES_PER_PROMPT, Comparison, compare

pytestmark = pytest.mark.filterwarnings("ignore:Reward 'second'")

KINDS = ["raise", "None", "NaN", "length", "slow"]
RATES = [0.01, 0.1, 0.5]
TIMEOUT = 0.2


class Faulty(Reward):
    """``reward``, but for faults that no response has a part in.

    Args:
        reward: A reward.
        kind: ``None`` and ``NaN`` befall a response, the others a whole call.
        rate: How often.
    """

    required_columns = ("context",)

    def __init__(self, reward: Reward, kind: str, rate: float) -> None:
        self.reward, self.kind, self.rate = reward, kind, rate
        self.draw = random.Random(0)
        self.faults = 0

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> Any:
        scores: Any = self.reward(prompts, completions, **columns)
        if self.kind in ("None", "NaN"):
            fault = None if self.kind == "None" else math.nan
            return [fault if self._hit() else score for score in scores]
        if self._hit():
            match self.kind:
                case "raise":
                    raise ConnectionError("busy")
                case "length":
                    return scores[:-1]
                case "slow":
                    time.sleep(2 * TIMEOUT)
        return scores

    def _hit(self) -> bool:
        hit = self.draw.random() < self.rate
        self.faults += hit
        return hit


class Watched(CLPModule):
    """Counts what was sampled, kept and dropped."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.sampled = self.lost = 0

    def score(self, rollout: Any) -> Any:
        before = self.tally._sums.get("dropped", 0)
        kept, scores = super().score(rollout)
        dropped = self.tally._sums["dropped"] - before
        assert len(kept) + dropped == len(rollout) and len(scores.raw) == len(kept)
        # Whoever is left has a sibling.
        assert not len(kept) or kept.groups.bincount().min() >= 2
        self.sampled, self.lost = self.sampled + len(rollout), self.lost + dropped
        return kept, scores


def run(
    kind: str, rate: float, folder: Path, root: Path, passes: int, **options: Any
) -> tuple[Comparison, Watched, Faulty]:
    """The gradient under faults of the second reward."""
    made: list[Any] = []

    def make(base: str, conditioner: Any, rewards: dict[str, Any], **arguments: Any) -> CLPModule:
        faulty = Faulty(rewards["second"], kind, rate)
        made.extend([Watched(base, conditioner, rewards | {"second": faulty}, **arguments), faulty])
        made[0].rewards.faults.reward_retry_wait = 0.0
        return made[0]

    # None is no fault but an abstention: no signal from that reward, and so from all its scores
    # as much less. (One without a scored sibling has none either.)
    siblings = SAMPLES_PER_PROMPT - 1
    scored = (1 - rate) * (1 - rate**siblings) if kind == "None" else 1.0
    options = {"max_dropped": 1.0, "reward_timeout": TIMEOUT if kind == "slow" else None} | options
    counted = (1.0, scored)
    comparison = compare(make, ExactTask(), folder, root, passes, counted=counted, **options)
    return comparison, *made


def check(kind: str, rate: float, folder: Path, root: Path, passes: int) -> Comparison:
    comparison, module, faulty = run(kind, rate, folder, root, passes, on_reward_error="drop")
    assert faulty.faults
    assert comparison.agrees, comparison
    assert (module.lost > 0) == (kind != "None")
    assert module.rewards.dropped <= module.lost  # and those that lost their siblings
    return comparison


@pytest.mark.parametrize(("kind", "rate"), [("NaN", 0.5), ("None", 0.5), ("length", 0.1)])
def test_what_is_kept_is_unbiased(
    kind: str, rate: float, base_folder: Callable[[ExactTask], Path], tmp_path: Path
) -> None:
    comparison = check(kind, rate, base_folder(ExactTask()), tmp_path, PASSES // 2)
    assert (comparison.standard_error < 0.05).all(), comparison


@pytest.mark.slow
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_fault_at_every_rate(
    kind: str, rate: float, base_folder: Callable[[ExactTask], Path], tmp_path: Path
) -> None:
    # Half the responses dropped, half the samples: as many passes more.
    passes = round(PASSES * 1.3 / (1 - rate))
    comparison = check(kind, rate, base_folder(ExactTask()), tmp_path, passes)
    assert comparison.precise, comparison


@pytest.mark.slow
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "None"])
def test_retries_lose_nothing(
    kind: str, rate: float, base_folder: Callable[[ExactTask], Path], tmp_path: Path
) -> None:
    options = {"on_reward_error": "raise", "reward_retries": 20}
    base = base_folder(ExactTask())
    comparison, module, faulty = run(kind, rate, base, tmp_path, PASSES, **options)
    assert faulty.faults and module.lost == 0
    assert comparison.precise and comparison.agrees, comparison


@pytest.mark.parametrize(
    "rate", [pytest.param(rate, marks=pytest.mark.slow) for rate in RATES[:-1]] + RATES[-1:]
)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "None"])
def test_raise_stops_at_the_first_fault(
    kind: str, rate: float, base_folder: Callable[[ExactTask], Path], tmp_path: Path
) -> None:
    with pytest.raises(RewardError, match=r"Reward 'second' .* Prompt: .* Completion: "):
        run(kind, rate, base_folder(ExactTask()), tmp_path, round(10 / rate))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "None"])
def test_too_many_drops_stop_the_run(
    kind: str, base_folder: Callable[[ExactTask], Path], tmp_path: Path
) -> None:
    options = {"on_reward_error": "drop", "max_dropped": 0.2}
    with pytest.raises(
        RewardError, match=r"Step \d: .* responses of the last \d step.* max_dropped=0\.2.*'second'"
    ):
        run(kind, 0.6, base_folder(ExactTask()), tmp_path, 20, **options)
