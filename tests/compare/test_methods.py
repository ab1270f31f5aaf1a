from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clp_lightning.compare import compare_fronts
from clp_lightning.types import Preference
from tests.compare.fronts import CORNERS, flat, write_front


def by_label(comparison: dict[str, Any], label: str) -> dict[str, Any]:
    (found,) = [method for method in comparison["methods"] if method["label"] == label]
    assert isinstance(found, dict)
    return found


def means(numbers: dict[str, dict[str, float | None]]) -> dict[str, float | None]:
    return {name: number["mean"] for name, number in numbers.items()}


def test_point_estimates_by_hand(tmp_path: Path) -> None:
    # Rows: the reference, then (w, alpha) = ((1, 0), 0.2) and ((0, 1), 0.2); V = 0.8 w.R - 0.2 KL.
    rewards = [[[0, 0], [2, 0], [0, 1]], [[1, 1], [4, 0], [0, 3]]]
    write_front(tmp_path / "one-0", rewards, [1.0, 2.0])  # V 2.2 and 1.2, of the reference 0.4
    write_front(tmp_path / "one-1", flat([[0, 0], [5, 0], [0, 2]]), [1.0, 2.0], seed=1)  # 3.8, 1.2
    write_front(tmp_path / "two", flat([[0, 0], [1, 1], [1, 1]]))  # 0.8 and 0.8
    found = compare_fronts([tmp_path / name for name in ("one-0", "one-1", "two")])
    one, two = by_label(found, "one"), by_label(found, "two")
    assert [run["seed"] for run in one["runs"]] == [0, 1]

    got = means(one["metrics"])
    reference = (0.4 + 0 + 0) / 3  # of all three runs
    assert got["value_gain"] == pytest.approx((1.7 + 2.5) / 2 - reference)
    assert got["worst_value"] == pytest.approx(1.2)
    # V_u(p_u') of the other's point: -0.4 and -0.2; so 1.7 - 0.7 and 2.5 - 1.1.
    assert got["steering_gain"] == pytest.approx((1.0 + 1.4) / 2)
    assert got["consistency"] == pytest.approx(1)
    assert (got["kl"], got["length"]) == (1.5, 5.5)
    # Above (-1, -1): 4 x 1 and 1 x 3 share a unit square; then 6 x 1 and 1 x 3.
    assert one["hypervolume"][0]["mean"] == pytest.approx((6 + 8) / 2)
    assert one["hypervolume"][0]["p"] is None
    assert "value_difference" not in one["metrics"]
    assert [p["value_difference"] for p in one["points"]] == [None, None]
    assert [p["value"]["mean"] for p in one["points"]] == pytest.approx([3.0, 1.2])
    assert one["points"][0]["rewards"]["kind"]["mean"] == pytest.approx(4.0)
    assert [p["value_reference"] for p in one["points"]] == pytest.approx([reference] * 2)

    assert two["metrics"]["value_difference"]["mean"] == pytest.approx(0.8 - 2.1)
    assert two["hypervolume"][0]["difference"]["mean"] == pytest.approx(4 - 7)
    got = [point["value_difference"]["mean"] for point in two["points"]]
    assert got == pytest.approx([0.8 - 3.0, 0.8 - 1.2])
    assert two["metrics"]["steering_gain"]["mean"] == pytest.approx(0)
    assert "consistency" not in two["metrics"]

    against = compare_fronts([tmp_path / name for name in ("one-0", "one-1", "two")], "two")
    assert by_label(against, "one")["metrics"]["value_difference"]["mean"] == pytest.approx(1.3)
    assert by_label(against, "one")["metrics"]["kl"] == one["metrics"]["kl"]


def test_seeds_are_drawn_whole(tmp_path: Path) -> None:
    # No prompt differs, so each resample is (1, 1), (1, 3), (3, 1) or (3, 3) times 0.8.
    for seed, size in enumerate((1, 3)):
        write_front(tmp_path / f"a-{seed}", flat([[0, 0], [size, 0], [0, size]]), seed=seed)
    write_front(tmp_path / "b", flat([[0, 0], [1, 0], [0, 1]]))
    found = compare_fronts([tmp_path / name for name in ("a-0", "a-1", "b")])
    gain = by_label(found, "a")["metrics"]["value_gain"]
    assert list(gain.values()) == pytest.approx([0.8 * 2, 0.8, 0.8 * 3])
    gain = by_label(found, "b")["metrics"]["value_gain"]
    assert list(gain.values()) == pytest.approx([0.8, 0.8, 0.8])


def test_prompts_are_drawn_together_for_all_methods(tmp_path: Path) -> None:
    difficulty = torch.tensor([0.0, 100.0, -50.0, 9.0]).reshape(4, 1, 1)
    base = difficulty + torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    write_front(tmp_path / "a", base)
    write_front(tmp_path / "b", base + torch.tensor([[0.0], [0.5], [0.25]]))
    found = compare_fronts([tmp_path / "a", tmp_path / "b"])
    b = by_label(found, "b")
    value = b["points"][0]["value"]
    assert value["high"] - value["low"] > 50
    # 0.8 x 0.5 and 0.8 x 0.25, whichever prompts are drawn
    for point, gap in zip(b["points"], (0.4, 0.2), strict=True):
        assert list(point["value_difference"].values()) == pytest.approx([gap] * 3, abs=1e-5)
    assert list(b["metrics"]["value_difference"].values()) == pytest.approx([0.3] * 3, abs=1e-5)


def test_a_report_repeats_itself(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    for name in ("a-0", "a-1", "b-0", "b-1", "c"):
        rewards = torch.randn(6, 3, 2, generator=random)
        write_front(tmp_path / name, rewards, seed=int(name[-1] == "1"))
    paths = [str(tmp_path / name) for name in ("a-0", "a-1", "b-0", "b-1")]
    once, again = compare_fronts(paths), compare_fronts(paths)
    assert once == again
    more = compare_fronts([paths[0], paths[1], str(tmp_path / "c"), *paths[2:]])
    for label in ("a", "b"):
        for name in ("hypervolume", "points"):
            kept, new = by_label(once, label)[name], by_label(more, label)[name]
            for one, two in zip(kept, new, strict=True):
                one, two = ({k: e[k] for k in e if k[:6] != "value_"} for e in (one, two))
                assert one == two


def test_closed_gap_over_seeds_and_weightings(tmp_path: Path) -> None:
    rewards = flat([[0, 0], [1, 0], [0, 1]])
    for seed, gaps in enumerate(([0.5, 0.7], [0.9, 0.3])):
        write_front(tmp_path / f"a-{seed}", rewards, seed=seed, closed_gap=gaps, unseen=[0.1, 0.2])
    write_front(tmp_path / "b", rewards, closed_gap=[None, 0.8])
    write_front(tmp_path / "c", rewards)
    found = compare_fronts([tmp_path / name for name in ("a-0", "a-1", "b", "c")])
    a, b, c = (by_label(found, label) for label in "abc")
    assert a["metrics"]["closed_gap"] == pytest.approx({"mean": 0.6, "low": 0.6, "high": 0.6})
    assert a["metrics"]["closed_gap_worst"]["mean"] == 0.3
    assert a["closed_gap_by_seed"] == [
        pytest.approx({"mean": 0.6, "worst": 0.5}),
        pytest.approx({"mean": 0.6, "worst": 0.3}),
    ]
    assert a["metrics"]["closed_gap_unseen"]["mean"] == pytest.approx(0.15)
    assert a["points"][1]["closed_gap_unseen"]["mean"] == pytest.approx(0.2)
    assert "closed_gap_unseen" not in b["metrics"]
    # 0.5 and 0.9: every resample holds one of them twice, or both
    assert list(a["points"][0]["closed_gap"].values()) == pytest.approx([0.7, 0.5, 0.9])
    assert b["metrics"]["closed_gap"] == {"mean": 0.8, "low": None, "high": None}
    assert b["points"][0]["closed_gap"]["mean"] is None
    assert "closed_gap" not in c["metrics"]
    assert "closed_gap" not in c["points"][0]


def test_each_alpha_has_its_hypervolume(tmp_path: Path) -> None:
    grid = Preference.cat([CORNERS, Preference(torch.eye(2), torch.tensor([0.5, 0.5]))])
    rewards = flat([[0, 0], [3, 0], [0, 2], [1, 0], [0, 1]])
    write_front(tmp_path / "a", rewards, grid=grid)
    write_front(tmp_path / "b", rewards, grid=grid)
    found = compare_fronts([tmp_path / "a", tmp_path / "b"])
    volumes = [(v["alpha"], v["mean"], v["p"]) for v in by_label(found, "b")["hypervolume"]]
    assert volumes == [(0.2, pytest.approx(6), 1.0), (0.5, pytest.approx(3), 1.0)]
    assert found["reference"]["hypervolume"] == pytest.approx([1, 1])

    rewards = rewards.repeat(6, 1, 1)
    write_front(tmp_path / "c", rewards, grid=grid)
    rewards[:, 3:] += 1  # the points of alpha 0.5
    write_front(tmp_path / "d", rewards, grid=grid)
    found = compare_fronts([tmp_path / "c", tmp_path / "d"])
    p = [volume["p"] for volume in by_label(found, "d")["hypervolume"]]
    assert p[0] == 1
    assert p[1] < 0.01


def test_without_a_dial(tmp_path: Path) -> None:
    grid = Preference(torch.ones(1, 1), torch.tensor([0.5]))
    for name, reward in (("a", 2.0), ("b", 4.0)):
        rewards = flat([[0.0], [reward]], num_prompts=3) + torch.arange(3.0).reshape(3, 1, 1)
        write_front(tmp_path / name, rewards, grid=grid, names=["kind"])
    found = compare_fronts([tmp_path / "a", tmp_path / "b"])
    assert by_label(found, "b")["metrics"]["value_difference"]["mean"] == pytest.approx(1)
    assert "steering_gain" not in by_label(found, "b")["metrics"]


def test_a_reward_that_scored_nothing_is_undefined(tmp_path: Path) -> None:
    rewards = flat([[0, 0], [1, 0], [0, 1]]).clone()
    write_front(tmp_path / "a", rewards)
    rewards[:, 1, 1] = float("nan")
    write_front(tmp_path / "b", rewards)
    b = by_label(compare_fronts([tmp_path / "a", tmp_path / "b"]), "b")
    assert b["hypervolume"][0]["mean"] is None
    assert b["hypervolume"][0]["p"] is None
    # At the corner where it weighs nothing V is known.
    assert b["points"][0]["value"]["mean"] == pytest.approx(0.8)
    assert b["points"][0]["rewards"]["short"]["mean"] is None
