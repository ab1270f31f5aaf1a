from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from clp_lightning.functional import dial_passes
from clp_lightning.metrics import Front, FrontReport, Grid
from clp_lightning.types import Preference

NAN = float("nan")
NAMES = ["a", "b"]
CORNERS = Grid(divisions=1, alphas=[0.2]).preferences(NAMES)


def sphere(grid: Preference) -> Tensor:
    return grid.weights / grid.weights.norm(dim=-1, keepdim=True)


def true_gain(grid: Preference, dial: float) -> float:
    """Sum over k of Cov((1 - alpha) w_k, dial w_k / |w|), alpha constant."""
    u = (1 - grid.alpha[:, None]) * grid.weights
    f = dial * sphere(grid)
    return ((u - u.mean(0)) * (f - f.mean(0))).mean(0).sum().item()


def table(
    grid: Preference, num_prompts: int, samples: int, *, dial: float, seed: int = 0
) -> dict[str, Tensor]:
    """Noisy rewards at ``dial * w / |w|``, the best on a sphere; the reference stands at 0."""
    random = torch.Generator().manual_seed(seed)
    point, prompt, sample = torch.meshgrid(
        torch.arange(-1, len(grid)),
        torch.arange(num_prompts),
        torch.arange(samples),
        indexing="ij",
    )
    point, prompt, sample = point.flatten(), prompt.flatten(), sample.flatten()
    k = grid.num_rewards
    difficulty = torch.randn(num_prompts, k, generator=random)[prompt]
    noise = torch.randn(len(point), k, generator=random)
    skill = torch.where((point >= 0).unsqueeze(-1), dial * sphere(grid)[point], 0)
    rewards = difficulty + noise + skill
    return {
        "point": point,
        "prompt_ids": prompt,
        "sample": sample,
        "rewards": 10 * rewards,
        "normalized": rewards,
        "log_ratio": torch.where(point >= 0, abs(dial), 0.0),
        "length": 5 + sample,
        "truncated": sample == 0,
    }


def report(names: list[str], grid: Preference, rows: dict[str, Tensor]) -> FrontReport:
    front = Front(names, grid)
    front.update(**rows)
    return front.compute()


def by_hand() -> dict[str, Tensor]:
    """Two prompts; reference, corner a, corner b; two samples at corner a of prompt 0."""
    point = torch.tensor([-1, -1, 0, 0, 0, 1, 1])
    rewards = torch.tensor(
        [[0.0, 0.0], [0.0, 0.0], [1.0, -1.0], [3.0, NAN], [4.0, 0.0], [NAN, 2.0], [1.0, 4.0]]
    )
    return {
        "point": point,
        "prompt_ids": torch.tensor([0, 7, 0, 0, 7, 0, 7]),
        "sample": torch.tensor([0, 0, 0, 1, 0, 0, 0]),
        "rewards": 10 * rewards,
        "normalized": rewards,
        "log_ratio": torch.tensor([0.0, 0.0, 1.0, 3.0, 4.0, 0.5, 1.5]),
        "length": torch.tensor([4, 6, 1, 3, 4, 2, 2]),
        "truncated": torch.tensor([False, True, True, False, False, False, False]),
    }


def test_front_by_hand() -> None:
    got = report(NAMES, CORNERS, by_hand()).to_dict()
    a, b = got["points"]
    # Prompt 0: a (1 + 3) / 2, b -1 (the other was not scored), KL 2; prompt 7: 4, 0, 4.
    assert a["normalized"] == {"a": 3.0, "b": -0.5}
    assert a["rewards"] == {"a": 30.0, "b": -5.0}
    assert (a["kl"], a["length"], a["truncated"], a["n"]) == (3.0, 3.0, 0.25, 2)
    assert a["weights"] == {"a": 1.0, "b": 0.0} and a["alpha"] == 0.2
    assert a["value"] == pytest.approx(0.8 * 3 - 0.2 * 3)
    assert a["value_reference"] == 0
    # Reward a was scored for prompt 7 only, and has no weight here.
    assert b["normalized"] == {"a": 1.0, "b": 3.0}
    assert b["value"] == pytest.approx(0.8 * 3 - 0.2 * 1)
    assert got["reference"]["length"] == 5.0 and got["reference"]["n"] == 2
    metrics = got["metrics"]
    assert metrics["value_gain"]["mean"] == pytest.approx((1.8 + 2.2) / 2)
    # V_a(b) = 0.8 * 1 - 0.2 * 1 = 0.6, V_b(a) = 0.8 * -0.5 - 0.2 * 3 = -1; G = 2 - (4 - 0.4) / 4.
    assert metrics["steering_gain"]["mean"] == pytest.approx(2 - 0.9)
    assert metrics["steering_gain"]["predicted"] is None  # one reference sample: no covariance
    # Above (-1, -1): 4 x 0.5 and 2 x 4, overlapping in 2 x 0.5.
    assert metrics["hypervolume"][0]["value"] == pytest.approx(2 + 8 - 1)
    assert metrics["mip"] == 3.0
    assert metrics["spearman"] == {"a": pytest.approx(1.0), "b": pytest.approx(1.0)}


def test_the_schema_of_front_json() -> None:
    got = report(NAMES, CORNERS, by_hand()).to_dict()
    assert list(got) == [
        "schema",
        "rewards",
        "reference_point",
        "points",
        "reference",
        "metrics",
    ]
    assert got["schema"] == 1 and got["rewards"] == NAMES and got["reference_point"] == [-1, -1]
    described = ["rewards", "normalized", "kl", "length", "truncated"]
    assert list(got["points"][0]) == [
        "weights",
        "alpha",
        *described,
        "value",
        "value_reference",
        "n",
    ]
    assert list(got["reference"]) == [*described, "n"]
    assert list(got["metrics"]) == [
        "value_gain",
        "steering_gain",
        "consistency",
        "envy",
        "hypervolume",
        "mip",
        "spearman",
    ]
    assert list(got["metrics"]["steering_gain"]) == ["mean", "low", "high", "predicted"]
    assert list(got["metrics"]["hypervolume"][0]) == ["alpha", "value", "reference"]
    assert json.loads(json.dumps(got, allow_nan=False)) == got


def test_duplicates_count_once_and_batches_do_not_matter() -> None:
    rows = table(CORNERS, 6, 2, dial=1.0)
    whole = report(NAMES, CORNERS, rows)
    front = Front(NAMES, CORNERS)
    shuffled = torch.randperm(len(rows["point"]), generator=torch.Generator().manual_seed(1))
    for part in (shuffled[:7], shuffled[7:], shuffled[3:12]):
        front.update(**{name: column[part] for name, column in rows.items()})
    assert len(front.compute().samples) == len(rows["point"])
    assert front.compute().to_dict() == whole.to_dict()


def test_the_same_data_give_the_same_interval_whatever_the_global_seed() -> None:
    rows = table(CORNERS, 10, 2, dial=1.0)
    torch.manual_seed(1)
    one = report(NAMES, CORNERS, rows).to_dict()
    torch.manual_seed(2)
    assert report(NAMES, CORNERS, rows).to_dict() == one


GRID = Grid(divisions=4).preferences(["a", "b", "c"])


@pytest.mark.parametrize(("dial", "passes"), [(2.0, True), (0.0, False), (-2.0, False)])
def test_dials(dial: float, passes: bool) -> None:
    got = report(["a", "b", "c"], GRID, table(GRID, 48, 2, dial=dial)).to_dict()
    assert dial_passes(got) is passes
    metrics = got["metrics"]
    gain = metrics["steering_gain"]
    if dial == 0:
        assert gain["low"] < 0 < gain["high"]
        assert metrics["consistency"] == {"mean": None, "low": None, "high": None}
    else:
        assert gain["mean"] == pytest.approx(true_gain(GRID, dial), rel=0.15)
        assert gain["low"] < true_gain(GRID, dial) < gain["high"]
        assert metrics["consistency"]["mean"] == pytest.approx(float(dial > 0), abs=0.05)
    assert (metrics["envy"]["mean"] is None) == (dial <= 0)


def test_the_interval_covers_as_often_as_it_says() -> None:
    # Binomial(100, 0.95) is at least 88 in 99.6 % of all cases; 40 prompts cost a little more.
    truth, hits = true_gain(GRID, 0.3), 0
    for seed in range(100):
        rows = table(GRID, 40, 1, dial=0.3, seed=seed)
        gain = report(["a", "b", "c"], GRID, rows).steering_gain
        assert gain.low is not None and gain.high is not None
        hits += gain.low <= truth <= gain.high
    assert 87 <= hits <= 100


def test_the_predicted_gain_reads_the_spread_within_prompts_only() -> None:
    # Noise within a prompt has variance 1; the difficulty between prompts must not count.
    found = report(NAMES, CORNERS, table(CORNERS, 2_000, 2, dial=1.0))
    # C = I, corners: tr(Cov w) = 1/2, w'w = 1: G0 = value gain.
    assert found.predicted_gain == pytest.approx(found.value_gain.mean, rel=0.05)


def test_the_reference_of_the_hypervolume_has_the_luck_of_the_grid() -> None:
    # A dial that does nothing is the reference sampled 15 times: the same volume on average,
    # above that of the reference's means, because the best of 15 points are lucky.
    volumes = []
    for seed in range(30):
        got = report(["a", "b", "c"], GRID, table(GRID, 48, 8, dial=0.0, seed=seed)).to_dict()
        (volume,) = got["metrics"]["hypervolume"]
        alone = 1.0
        for value in got["reference"]["normalized"].values():
            alone *= value + 1
        volumes.append([alone, volume["reference"], volume["value"]])
    alone, reference, value = torch.tensor(volumes).mean(0).tolist()
    assert reference == pytest.approx(value, rel=0.03)
    assert reference > 1.1 * alone


def test_one_reward_with_one_alpha_has_no_dial() -> None:
    grid = Grid().preferences(["a"])
    found = report(["a"], grid, table(grid, 8, 2, dial=1.0))
    metrics = found.to_dict()["metrics"]
    nothing = {"mean": None, "low": None, "high": None}
    assert metrics["steering_gain"] == nothing | {"predicted": None}
    assert metrics["consistency"] == metrics["envy"] == nothing
    assert metrics["value_gain"]["mean"] is not None
    assert metrics["spearman"] == {"a": None}


def test_one_reward_with_several_alphas_has_one() -> None:
    grid = Grid(alphas=[0.1, 0.5]).preferences(["a"])
    rows = table(grid, 20, 2, dial=0.0)
    rows["normalized"] = rows["normalized"] + (rows["point"] == 0).unsqueeze(-1) * 4.0
    rows["log_ratio"] = (rows["point"] == 0) * 5.0
    found = report(["a"], grid, rows)
    # Cov((1 - alpha), R) + Cov(alpha, -KL) = 0.2 * 2 + 0.2 * 2.5, up to noise.
    assert found.steering_gain.mean == pytest.approx(0.9, abs=0.1)
    assert found.predicted_gain is not None
    assert [volume["alpha"] for volume in found.hypervolume] == [0.1, 0.5]


def test_one_prompt_has_no_interval() -> None:
    metrics = report(NAMES, CORNERS, table(CORNERS, 1, 2, dial=3.0)).to_dict()["metrics"]
    assert metrics["value_gain"]["mean"] is not None and metrics["value_gain"]["low"] is None
    assert metrics["consistency"]["mean"] is None and metrics["envy"]["mean"] is None


def test_a_reward_that_is_never_scored_is_null_not_zero() -> None:
    rows = table(CORNERS, 4, 2, dial=1.0)
    for name in ("rewards", "normalized"):
        rows[name][:, 1] = NAN
    found = report(NAMES, CORNERS, rows)
    got = found.to_dict()
    assert got["points"][0]["normalized"]["b"] is None
    assert got["points"][0]["value"] is not None  # b has no weight here
    assert got["points"][1]["value"] is None
    assert got["metrics"]["value_gain"]["mean"] is None
    assert got["metrics"]["hypervolume"] == [{"alpha": 0.2, "value": None, "reference": None}]
    assert found.scalars()["value"] != found.scalars()["value"]


def test_scalars_have_stable_names() -> None:
    got = report(NAMES, CORNERS, by_hand()).scalars()
    assert set(got) == {
        "value",
        "value_gain",
        "steering_gain",
        "consistency",
        "envy",
        "hypervolume",
        "kl",
        "length",
        "truncated",
    }
    assert got["value"] == pytest.approx(2.0) and got["kl"] == 2.0 and got["length"] == 2.5


def test_samples_keep_their_columns() -> None:
    columns = report(NAMES, CORNERS, by_hand()).samples.columns(NAMES)
    assert list(columns) == [
        "prompt_id",
        "point",
        "sample",
        "reward/a",
        "reward/b",
        "normalized/a",
        "normalized/b",
        "log_ratio",
        "length",
        "truncated",
    ]
    assert columns["prompt_id"].dtype == torch.int64
    assert columns["point"].dtype == columns["sample"].dtype == torch.int32
    # Sorted by prompt, point, sample.
    assert columns["reward/a"][:4].tolist() == [0, 10, 30, pytest.approx(NAN, nan_ok=True)]


def test_prompt_ids_need_all_their_bits() -> None:
    rows = by_hand()
    rows["prompt_ids"] = rows["prompt_ids"] + 2**40
    samples = report(NAMES, CORNERS, rows).samples
    assert samples.prompt_id.unique().tolist() == [2**40, 2**40 + 7]


def test_bad_fronts_are_refused() -> None:
    with pytest.raises(ValueError, match="2 weights for 3 rewards"):
        Front(["a", "b", "c"], CORNERS)
    with pytest.raises(ValueError, match="reference_point needs one number for each"):
        Front(NAMES, CORNERS, reference_point=[0.0])
    rows = {name: column[:5] for name, column in by_hand().items()}
    with pytest.raises(ValueError, match="no response of point 1 of the grid"):
        report(NAMES, CORNERS, rows)


def _ragged(rank: int, folder: str, empty: bool) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    rows = table(CORNERS, 5, 2, dial=1.0)
    front = Front(NAMES, CORNERS)
    cut = 0 if empty else 9
    part = slice(cut, None) if rank == 0 else slice(None, cut + 2 * (not empty))  # 2 rows twice
    if rank == 0 or not empty:
        front.update(**{name: column[part] for name, column in rows.items()})
    merged = front.compute().to_dict()
    assert merged == report_alone(rows)
    dist.destroy_process_group()


def report_alone(rows: dict[str, Tensor]) -> dict[str, Any]:
    front = Front(NAMES, CORNERS, None)
    front._to_sync = False
    front.update(**rows)
    return front.compute().to_dict()


@pytest.mark.parametrize("empty", [False, True], ids=["ragged", "one empty"])
def test_two_processes_with_different_numbers_of_responses(tmp_path: Any, empty: bool) -> None:
    mp.spawn(_ragged, (str(tmp_path), empty), nprocs=2)


def test_envy_needs_a_value_gain_to_be_a_share_of() -> None:
    metrics = report(NAMES, CORNERS, table(CORNERS, 5, 1, dial=0.5, seed=0)).to_dict()["metrics"]
    assert metrics["value_gain"]["low"] < 0 < metrics["value_gain"]["mean"]
    assert metrics["envy"] == {"mean": None, "low": None, "high": None}
