from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clp_lightning import Preference, RewardBank, RunCheckpoint
from clp_lightning.__main__ import run
from clp_lightning.cli import main
from clp_lightning.functional import check_weights, parse_weights
from clp_lightning.metrics import Estimate
from clp_lightning.pick import Measured, Meter, Wish, find_preference
from clp_lightning.pick.command import _options, _reaches
from clp_lightning.pick.search import _Scale, parse_wishes
from tests.helpers import NAMES, prompt_batch
from tests.runs import (
    Counted,
    kind,
    make_data,
    make_module,
    make_trainer,
    run_config,
    write_config,
    write_rows,
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


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("kind>0.5", "is no wish"),
        ("kind>=", "is no wish"),
        ("kind>=1.2.3", "is no wish"),
        ("kind>=.", "is no wish"),
        ("kid>=0.5", "'kid' is not measured; there are: kind, short, kl, length"),
    ],
)
def test_wishes_that_cannot_be_read(where: str, message: str, meter: Meter) -> None:
    with pytest.raises(ValueError, match=message):
        parse_wishes(where, meter.quantities)


def test_the_command(tiny_folder: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    main(
        ["fit", "--config", write_config(tmp_path / "c.yaml", run_config(tmp_path, tiny_folder()))]
    )
    capsys.readouterr()
    asked = ["pick", "--ckpt", str(tmp_path / "run"), "--maximize", "short"]
    asked += ["--search_prompts", "4", "--check_prompts", "4", "--evaluations", "3"]
    run([*asked, "--where", "kind>=-1,kl<=9"])
    shown = capsys.readouterr().out
    assert "pick: --weights kind=" in shown
    assert "On 4 held-out prompts" in shown
    assert shown.count("met") == 2
    with pytest.raises(SystemExit) as stopped:
        run([*asked, "--where", "kind>=1.5", "--alphas", "[0.2, 0.4]"])
    assert stopped.value.code == 1
    shown = capsys.readouterr().out
    assert "infeasible" in shown
    assert "kind>=1.5: missed by" in shown
    assert "highest value that was reached" in shown

    rows = write_rows(tmp_path / "other.jsonl", 12)
    run([*asked, "--prompts", str(rows)])
    assert "On 4 held-out prompts" in capsys.readouterr().out
    wrong = {
        "search_prompts must be at least 1; got 0": [*asked, "--search_prompts", "0"],
        "check_prompts must be at least 2; got 1": [*asked, "--check_prompts", "1"],
        "samples must be at least 1; got 0": [*asked, "--samples", "0"],
        "evaluations must be at least 0; got -1": [*asked, "--evaluations", "-1"],
        "rows must be at least 1; got 0": [*asked, "--rows", "0"],
        "seed must be at least 0; got -1": [*asked, "--seed", "-1"],
        "'tall' is not measured": [*asked[:3], "--maximize", "tall"],
        "There is no checkpoint": ["pick", "--ckpt", str(tmp_path), "--maximize", "kind"],
    }
    for message, args in wrong.items():
        with pytest.raises(SystemExit):
            run(args)
        assert message in capsys.readouterr().err


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


def test_a_wish_that_held_out_prompts_miss_is_told(
    tiny_folder: Callable[..., Path], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    """A reward that is 1 on the prompts of the search and 0 on the others."""
    config = run_config(tmp_path, tiny_folder())
    main(["fit", "--config", write_config(tmp_path / "c.yaml", config)])
    measure = Meter.measure
    sizes: list[int] = []

    def measured(self: Meter, preferences: Preference) -> list[Measured]:
        found = measure(self, preferences)
        sizes.append(len(self.batch))
        for m in found:
            m.cells[:, 0] = 1.0 if len(self.batch) == 3 else 0.0
        return found

    monkeypatch.setattr(Meter, "measure", measured)
    asked = ["pick", "--ckpt", str(tmp_path / "run"), "--maximize", "short", "--evaluations", "2"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run([*asked, "--search_prompts", "3", "--check_prompts", "4", "--where", "kind>=0.5"])
    assert stopped.value.code == 1
    assert set(sizes) == {3, 4}
    shown = capsys.readouterr().out
    assert "not confirmed: kind>=0.5" in shown and "infeasible" not in shown


def test_rewards_that_score_nothing_are_named(
    tiny_folder: Callable[..., Path], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    config = run_config(tmp_path, tiny_folder())
    main(["fit", "--config", write_config(tmp_path / "c.yaml", config)])
    measure = Meter.measure

    def measured(self: Meter, preferences: Preference) -> list[Measured]:
        found = measure(self, preferences)
        for m in found:
            m.cells[:, 0] = torch.nan
        return found

    monkeypatch.setattr(Meter, "measure", measured)
    asked = ["pick", "--ckpt", str(tmp_path / "run"), "--evaluations", "2"]
    asked += ["--search_prompts", "3", "--check_prompts", "4"]
    for args, where, code, message in (
        (["--maximize", "kind"], "err", 2, "Reward 'kind' scored none of the responses"),
        (["--maximize", "short", "--where", "kind>=0"], "out", 1, "kind>=0: never scored"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run([*asked, *args])
        assert stopped.value.code == code
        assert message in getattr(capsys.readouterr(), where)


def test_a_trained_dial_meets_a_floor_that_binds_on_held_out_prompts(
    tiny_folder: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    steps = 60
    config = run_config(
        tmp_path,
        tiny_folder(),
        max_steps=steps,
        accumulate_grad_batches=1,
        val_check_interval=steps,
    )
    config["model"]["init_args"] |= {
        "rewards": {"kind": "tests.runs.kind", "loud": "tests.runs.loud"},  # small and capitals
        "lr": 2e-2,
        "samples_per_prompt": 8,
        "statistics_prompts": 24,
    }
    alpha = {"class_path": "FixedAlpha", "init_args": {"alpha": 0.05}}
    config["trainer"]["callbacks"][0]["init_args"] = {"alpha": alpha}
    write_rows(tmp_path / "rows.jsonl", 49)
    config["data"]["init_args"] |= {"holdout": 16, "batch_size": 8}
    main(["fit", "--config", write_config(tmp_path / "c.yaml", config)])
    asked = ["pick", "--ckpt", str(tmp_path / "run"), "--maximize", "loud", "--samples", "4"]
    asked += ["--search_prompts", "16", "--check_prompts", "16"]
    capsys.readouterr()
    for floor in (0.3, 0.6):
        run([*asked, "--where", f"kind>={floor}"])
        shown = capsys.readouterr().out
        assert f">={floor} │ met" in shown
        kind_mean, loud_mean = (
            float(re.findall(rf"{name} │ +([\d.]+) │", shown)[0]) for name in ("kind", "loud")
        )
        # A letter cannot be both, so the floor costs; the corner kind = 1 would have loud near 0.
        assert kind_mean >= floor - 0.1 and loud_mean >= 0.7 * (1 - floor) - 0.1
    with pytest.raises(SystemExit) as stopped:
        run([*asked, "--where", "kind>=0.8,loud>=0.8"])
    assert stopped.value.code == 1
    assert "infeasible" in capsys.readouterr().out


def test_a_reward_without_an_import_path_is_told(
    tiny_folder: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    rewards = {"kind": lambda completions, **_: [1.0 for _ in completions], "short": Counted()}
    trainer = make_trainer(tmp_path, RunCheckpoint())
    trainer.fit(make_module(tiny_folder(), rewards=rewards), make_data(tmp_path))
    with pytest.raises(SystemExit):
        run(["pick", "--ckpt", str(tmp_path), "--maximize", "short"])
    told = capsys.readouterr().err
    assert "Reward 'kind' was a lambda" in told
    assert "Commands need rewards with an import path" in told
