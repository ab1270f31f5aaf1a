from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clp_lightning import Preference, RewardBank
from clp_lightning.functional import check_weights, parse_weights
from clp_lightning.metrics import Estimate
from clp_lightning.pick import Measured, Meter, Wish, find_preference
from clp_lightning.pick.command import _options, _reaches
from clp_lightning.pick.search import _Scale, parse_wishes
from tests.helpers import NAMES, prompt_batch
from tests.runs import (
    Counted,
    kind,
)
from tests.steerables import make_steerable, named_steerable

PROMPTS = ["tea", "a long walk", "fog?", "ink and owls", "x", "jam"]


class Paper:
    """A policy whose numbers are known: a = w1, b = 1 - w1^2, kl = (1 - alpha)^2, no noise."""

    quantities = ("a", "b", "kl")

    def __init__(self) -> None:
        self.asked = 0

    def measure(self, preferences: Preference) -> list[Measured]:
        self.asked += len(preferences)
        result = []
        for i in range(len(preferences)):
            w, alpha = preferences.weights[i, 0].double(), preferences.alpha[i].double()
            row = torch.stack([w, 1 - w**2, (1 - alpha) ** 2])
            result.append(Measured(preferences[i : i + 1], row.expand(4, 3)))
        return result


CORNERS = Preference(torch.eye(2), torch.tensor([0.1, 0.1]))


def search(
    wishes: list[Wish], maximize: str = "b", alphas: tuple[float, float] = (0.1, 0.1)
) -> Any:
    meter: Any = Paper()
    return find_preference(meter, meter, maximize, wishes, CORNERS, alphas)[0]


@pytest.mark.parametrize(
    ("where", "maximize", "alphas", "weight", "alpha"),
    [
        ("a>=0.6", "b", (0.1, 0.1), 0.6, 0.1),  # the floor binds
        ("b>=0.75", "a", (0.1, 0.1), 0.5, 0.1),  # 1 - w^2 = 0.75
        ("", "a", (0.1, 0.1), 1.0, 0.1),  # a corner
        ("b<=0.19,a<=0.95", "b", (0.1, 0.1), 0.9, 0.1),
        ("a>=0.6,kl<=0.25", "b", (0.1, 0.9), 0.6, None),  # any alpha >= 0.5 will do
        ("a>=0.6", "kl", (0.1, 0.9), None, 0.1),
    ],
)
def test_the_search_finds_what_paper_and_pencil_find(
    where: str,
    maximize: str,
    alphas: tuple[float, float],
    weight: float | None,
    alpha: float | None,
) -> None:
    wishes = parse_wishes(where, Paper.quantities)
    best = search(wishes, maximize, alphas)
    if weight is not None:
        assert float(best.preference.weights[0, 0]) == pytest.approx(weight, abs=0.04)
    if alpha is not None:
        assert float(best.preference.alpha[0]) == pytest.approx(alpha, abs=0.04)
    for wish in wishes:
        value = best.means[Paper.quantities.index(wish.quantity)]
        assert float(wish.shortfall(value)) <= 1e-3


def test_what_is_impossible_comes_as_close_as_it_can() -> None:
    best = search([Wish("a", True, 0.9), Wish("b", True, 0.5)])  # 1 - 0.81 = 0.19
    assert float(Wish("a", True, 0.9).shortfall(best.means[0])) <= 0.3
    assert float(best.means[0]) > 0.6


def test_a_preference_is_asked_once() -> None:
    meter: Any = Paper()
    other: Any = Paper()
    wishes = [Wish("a", True, 0.6)]
    find_preference(meter, other, "b", wishes, CORNERS, (0.1, 0.1), evaluations=8)
    assert meter.asked <= 2 + 8 + 2
    assert 1 <= other.asked <= 3


def test_what_was_never_scored_meets_nothing() -> None:
    class Silent(Paper):
        """``a`` is not scored below w1 = 0.4, where ``b`` is largest."""

        def measure(self, preferences: Preference) -> list[Measured]:
            found = super().measure(preferences)
            for m in found:
                if m.preference.weights[0, 0] < 0.4:
                    m.cells = m.cells.clone()
                    m.cells[:, 0] = torch.nan
            return found

    meter: Any = Silent()
    corners = CORNERS[torch.tensor([1, 0])]
    for wishes, target in (([Wish("a", True, 0.1)], "b"), ([], "a")):
        best = find_preference(meter, meter, target, wishes, corners, (0.1, 0.1))[0]
        assert float(best.preference.weights[0, 0]) >= 0.4
        assert not best.means[0].isnan()


def test_meeting_all_wishes_narrowly_comes_before_meeting_one_well() -> None:
    def measured(w: float, a: float, b: float) -> Measured:
        noise = torch.tensor([-0.1, 0.1]).double()[:, None]
        cells = torch.tensor([a, b]).double() + noise
        return Measured(Preference.single([w, 1 - w], 0.1), cells)

    # A standard error is 0.1: no choice has a margin of 1.64 for both.
    narrow, lopsided = measured(0.5, 0.51, 0.51), measured(0.9, 0.9, 0.49)
    scale = _Scale(["a", "b"], "a", [Wish("a", True, 0.5), Wish("b", True, 0.5)], 1.64)
    assert min([lopsided, narrow], key=scale.key) is narrow
    assert any(m is narrow for m in scale.finalists([lopsided, narrow]))


def test_a_floor_is_met_with_a_margin() -> None:
    class Noisy(Paper):
        def measure(self, preferences: Preference) -> list[Measured]:
            clean = super().measure(preferences)
            noise = torch.tensor([-0.3, 0.3, -0.3, 0.3]).double()  # of the prompts; its mean is 0
            return [
                Measured(m.preference, m.cells + noise[:, None] * torch.tensor([1.0, 0.0, 0.0]))
                for m in clean
            ]

    meter: Any = Noisy()
    best = find_preference(meter, meter, "b", [Wish("a", True, 0.5)], CORNERS, (0.1, 0.1))[0]
    # Eight prompts after the confirmation: 0.3 * sqrt(8 / 7) / sqrt(8) = 0.113 a standard error.
    assert float(best.errors[0]) == pytest.approx(0.3 / math.sqrt(7), abs=1e-6)
    assert float(best.means[0]) >= 0.5 + 1.6 * float(best.errors[0])


@pytest.fixture
def meter(tiny_folder: Callable[..., Path]) -> Meter:
    bank = RewardBank({"kind": kind, "short": Counted()})
    return Meter(make_steerable(tiny_folder()), bank, prompt_batch(PROMPTS), samples=2, rows=5)


def test_measuring_is_the_same_alone_and_together(meter: Meter) -> None:
    grid = Preference(
        torch.tensor([[1.0, 0.0], [0.3, 0.7], [0.3, 0.7]]), torch.tensor([0.0, 0.2, 1.0])
    )
    together = meter.measure(grid)
    for i, measured in enumerate(together):
        (alone,) = meter.measure(grid[i : i + 1])
        torch.testing.assert_close(alone.cells, measured.cells)
    assert not torch.equal(together[0].cells[:, :2], together[1].cells[:, :2])
    assert meter.quantities == [*NAMES, "kl", "length"]
    assert float(together[0].cells[:, 2].abs().min()) > 1e-3
    torch.testing.assert_close(together[2].cells[:, 2], torch.zeros(6).double(), atol=1e-5, rtol=0)
    meter.with_kl = False
    (without,) = meter.measure(grid[:1])
    assert without.cells[:, 2].isnan().all()
    rest = [0, 1, 3]
    torch.testing.assert_close(without.cells[:, rest], together[0].cells[:, rest])


def test_measured_numbers_are_means_over_the_responses_of_a_prompt(meter: Meter) -> None:
    steerable = meter.policy
    preference = steerable.preference({"kind": 0.3, "short": 0.7}, 0.2)
    (measured,) = meter.measure(preference)
    batch = prompt_batch(PROMPTS, preference[torch.zeros(6, dtype=torch.long)])
    rollout = steerable.engine.generate(steerable.policy, batch, 2, meter.sampling)
    scores = torch.tensor(kind(rollout.completions)).view(6, 2).mean(1).double()
    torch.testing.assert_close(measured.cells[:, 0], scores, atol=1e-6, rtol=0)
    torch.testing.assert_close(measured.cells[:, 3], rollout.lengths.view(6, 2).double().mean(1))
    estimate = measured.estimates()[0]
    assert estimate.low < scores.mean() < estimate.high  # type: ignore[operator]
    assert float(measured.errors[0]) == pytest.approx(float(scores.std() / math.sqrt(6)), rel=1e-5)


def test_a_reward_may_be_called_length(tiny_folder: Callable[..., Path]) -> None:
    names = ["length", "kl"]
    bank = RewardBank({"length": Counted(), "kl": kind})
    steerable = named_steerable(names, tiny_folder())
    meter = Meter(steerable, bank, prompt_batch(PROMPTS))
    assert meter.quantities == names
    (measured,) = meter.measure(steerable.preference({"length": 1, "kl": 0}, 0.1))
    each = measured.preference[torch.zeros(6, dtype=torch.long)]
    batch = replace(meter.batch, preference=each)
    rollout = steerable.engine.generate(steerable.policy, batch, 1, meter.sampling)
    assert measured.cells[:, 1].tolist() == pytest.approx(kind(rollout.completions))


def test_a_result_is_written_as_other_commands_read_it() -> None:
    names = ["a", "b", "c"]
    for row in ([1 / 3] * 3, [0.33335, 0.33335, 0.3333], [0.0, 1 / 7, 6 / 7]):
        line = _options(names, Preference.single(row, 1 / 3))
        _, weights, _, alpha = line.split()
        check_weights(parse_weights(weights), names)
        assert alpha == "0.3333"


def test_a_wish_is_held_where_the_interval_reaches_it() -> None:
    floor, ceiling = Wish("a", True, 0.5), Wish("a", False, 0.5)
    cases = [
        (floor, Estimate(0.6, 0.55, 0.65), True),
        (floor, Estimate(0.45, 0.4, 0.5), True),
        (floor, Estimate(0.4, 0.3, 0.49), False),
        (ceiling, Estimate(0.6, 0.5, 0.7), True),
        (ceiling, Estimate(0.6, 0.51, 0.7), False),
        (floor, Estimate(), False),
    ]
    for wish, estimate, expected in cases:
        assert _reaches(wish, estimate) is expected
