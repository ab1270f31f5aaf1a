from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from clp_lightning.compare import compare_fronts
from clp_lightning.compare.read import group, read_methods
from clp_lightning.types import Preference
from tests.compare.fronts import COST, NAMES, flat, write_front

REWARDS = flat([[0, 0], [2, 0], [0, 1]], num_prompts=3) + torch.arange(3.0).reshape(3, 1, 1)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the current one, with fronts that can be compared."""
    for name in ("lora-0", "lora-1", "full", "lr=1e-3+warm"):
        write_front(tmp_path / name, REWARDS, seed=int(name == "lora-1"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def corner(row: int) -> Preference:
    return Preference(torch.eye(2)[row : row + 1], torch.tensor([0.2]))


def test_labels_and_seeds(runs: Path) -> None:
    grouped = group(["lora-0", "best=full", "lora-1/front.json", "lr=1e-3+warm"])
    assert {
        label: [[str(p) for p in seed] for seed in seeds] for label, seeds in grouped.items()
    } == {
        "lora": [["lora-0"], ["lora-1/front.json"]],
        "best": [["full"]],
        "lr=1e-3+warm": [["lr=1e-3+warm"]],
    }
    grouped = group(["x=lora-0", "x=full+lora-1", "best=lr=1e-3+warm"])
    assert [len(seed) for seed in grouped["x"]] == [1, 2]
    assert [len(seed) for seed in grouped["best"]] == [1]


def test_a_checkpoint_stands_for_the_front_that_measured_it(runs: Path) -> None:
    folder = runs / "full" / "checkpoints"
    folder.mkdir()
    for name in ("last.ckpt", "step=5.ckpt"):
        torch.save({"state_dict": {}}, folder / name)
    assert list(group([folder / "last.ckpt"])) == ["full"]
    with pytest.raises(ValueError, match="measured last.ckpt, not step=5.ckpt"):
        group([folder / "step=5.ckpt"])
    front = json.loads((runs / "full/front.json").read_text())
    front["checkpoint"] = "elsewhere/full/checkpoints/step=5.ckpt"
    (runs / "full/front.json").write_text(json.dumps(front))
    assert list(group([folder / "step=5.ckpt"])) == ["full"]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "nothing to compare"),
        (["full", "nowhere"], "no front at nowhere/front.json"),
        (["full", "x=full/front.json"], "given twice"),
        (["full+lora-0"], "name it: LABEL=full"),
        (["=full"], "empty label"),
        (["x=full+"], "empty path"),
        (["x=full", "x=lora-0"], "2 runs of seed 0: full and lora-0"),
        (["x=full+lora-0"], "has the point .kind 1, short 0, alpha 0.2. 2 times"),
    ],
)
def test_arguments_that_are_refused(runs: Path, specs: list[str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_methods(specs)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"names": ["kind", "long"]},
            r"rewards differ: \['kind', 'short'\] and \['kind', 'long'\]",
        ),
        ({"max_new_tokens": 8}, r"decodings \(max_new_tokens\) differ: 4 and 8"),
        ({"temperature": 0.5}, r"decodings \(temperature\) differ: 1.0 and 0.5"),
        ({"ids": [0, 1, 7]}, r"prompts differ: 3 prompts and 3 prompts \(2 in both\)"),
        (
            {"grid": Preference(torch.eye(2), torch.tensor([0.2, 0.3]))},
            r"grids differ: 2 points and 2 points, only one has \(kind 0, short 1, alpha 0.2\)",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_fronts_that_cannot_be_compared(runs: Path, other: dict[str, Any], message: str) -> None:
    write_front(runs / "other", REWARDS, **other)
    with pytest.raises(ValueError, match=message) as raised:
        read_methods(["full", "other"])
    assert "full and other cannot be compared" in str(raised.value)


def test_engines_seeds_and_stages_may_differ(runs: Path) -> None:
    write_front(runs / "mod", REWARDS, engine="MOD", seed=5, stage="test")
    compared = read_methods(["full", "mod"])
    assert compared.methods[1].runs[0].engine == "MOD"
    assert not compared.renormalized
    assert not compared.warnings


def test_rewards_and_points_in_another_order(runs: Path) -> None:
    grid = Preference(torch.eye(2), torch.tensor([0.2, 0.2]))
    # Its first reward is `short`, so its first point is the first front's second one.
    rewards = REWARDS[:, [0, 2, 1]].flip(-1)
    write_front(runs / "other", rewards, [0.2, 0.1], grid=grid, names=NAMES[::-1], seed=3)
    write_front(runs / "same", REWARDS, [0.1, 0.2], closed_gap=[0.25, 0.75])
    write_front(runs / "more", rewards, [0.2, 0.1], names=NAMES[::-1], closed_gap=[0.75, 0.25])
    found = compare_fronts(["same", "other", "more"])
    same, other, more = found["methods"]
    for a, b, c in zip(same["points"], other["points"], more["points"], strict=True):
        assert b["rewards"] == a["rewards"]
        assert (b["kl"], b["value"]) == (a["kl"], a["value"])
        assert c["closed_gap"] == a["closed_gap"]
    assert other["hypervolume"][0]["p"] == 1


def test_all_are_put_into_the_units_of_the_first(runs: Path) -> None:
    write_front(runs / "first", REWARDS, units=(1.0, 4.0))
    write_front(runs / "other", REWARDS, units=(5.0, 2.0))
    write_front(runs / "same", REWARDS, units=(1.0, 4.0), seed=1)
    found = compare_fronts(["first", "other", "same"])
    first, other, same = found["methods"]
    units = found["units"]
    assert units["run"] == "first"
    assert list(units["renormalized"]) == ["other"]
    for name in NAMES:
        assert units["statistics"][name] == pytest.approx((1, 4))
        assert units["renormalized"]["other"][name] == pytest.approx((5, 2))
    # V at the first corner: 0.8 x (mean of 2, 3, 4 - 1) / 4
    assert first["points"][0]["value"]["mean"] == pytest.approx(0.8 * 2 / 4)
    for a, b, c in zip(first["points"], other["points"], same["points"], strict=True):
        assert b["value"] == pytest.approx(a["value"], rel=1e-6)
        assert c["value"] == a["value"]
    assert other["metrics"]["value_difference"]["mean"] == pytest.approx(0, abs=1e-6)
    assert other["hypervolume"][0]["p"] == 1


def test_a_reward_that_never_varies_has_no_known_units(runs: Path) -> None:
    constant = REWARDS.clone()
    constant[..., 1] = 3
    for name, units in {"still": (0, 1), "too": (0, 1), "scaled": (0, 2)}.items():
        write_front(runs / name, constant, units=units)
    assert read_methods(["still", "too"]).units[1] is None
    for other in ("full", "scaled"):
        with pytest.raises(ValueError, match="'short' is the same for all responses of still"):
            read_methods(["still", other])
    compare_fronts(["full", "scaled"])  # the other way round its units are known


def test_runs_of_single_preferences_are_joined(runs: Path) -> None:
    write_front(runs / "whole", REWARDS, [0.1, 0.2], closed_gap=[0.9, 0.8])
    for row, name in ((0, "kind"), (1, "short")):
        kl, gap = (0.1, 0.2)[row], (0.9, 0.8)[row]
        write_front(
            runs / name,
            REWARDS[:, [0, row + 1]],
            kl,
            grid=corner(row),
            units=(3.0 * row, 1.0 + row),
            closed_gap=[gap],
            cost=COST | {"forwards": 1 + row, "wall_s": 2.5 if row else None},
        )
    found = compare_fronts(["whole", "oracle=short+kind"])
    whole, oracle = found["methods"]
    assert oracle["runs"] == [{"name": "short + kind", "seed": 0, "engine": "TransformersEngine"}]
    for a, b in zip(whole["points"], oracle["points"], strict=True):
        for name in ("value", "value_gain", "kl"):
            assert b[name] == pytest.approx(a[name], rel=1e-6)
        assert b["closed_gap"] == a["closed_gap"]
    assert oracle["hypervolume"][0]["p"] == 1
    assert oracle["cost"] == {
        **{name: 2 * value for name, value in COST.items()},
        "wall_s": None,
        "forwards": 2,
    }
    assert whole["cost"] == COST
    # A union may stand first, too.
    assert compare_fronts(["oracle=short+kind", "whole"])["methods"][0]["label"] == "oracle"
    with pytest.raises(ValueError, match="grids differ: 2 points and 1 points"):
        read_methods(["whole", "kind"])


def test_another_base_is_noticed_however_few_prompts(runs: Path) -> None:
    rewards = torch.zeros(2, 3, 2)
    for name, mark in (("a", "1"), ("b", "1"), ("c", "2")):
        write_front(runs / name, rewards, base={"name": "x", "fingerprint": mark})
    compared = read_methods(["a", "b", "c"])
    assert compared.warnings == [
        "c and a were trained from different bases, so each is measured against a reference of "
        "its own."
    ]


def test_other_references_are_noticed(runs: Path) -> None:
    random = torch.Generator().manual_seed(0)
    rewards = torch.randn(30, 3, 2, generator=random)
    noise = torch.randn(30, 3, 2, generator=random)
    write_front(runs / "a", rewards)
    write_front(runs / "b", rewards + 0.1 * noise)
    write_front(runs / "c", rewards + 0.1 * noise + torch.tensor([0.0, 0.5]))
    compared = read_methods(["a", "b", "c"])
    (warning,) = compared.warnings
    assert "c and a differ in 'short'" in warning


def test_files_that_are_not_what_they_should_be(runs: Path) -> None:
    def damaged(name: str, change: Any) -> str:
        folder = runs / name
        shutil.copytree(runs / "full", folder)
        change(folder)
        return name

    def without_points(folder: Path) -> None:
        front = json.loads((folder / "front.json").read_text())
        del front["points"]
        (folder / "front.json").write_text(json.dumps(front))

    def cut_table(folder: Path) -> None:
        file = folder / "front_samples.parquet"
        table = pd.read_parquet(file)
        table[table.point < 1].to_parquet(file)

    def without_column(folder: Path) -> None:
        file = folder / "front_samples.parquet"
        pd.read_parquet(file).drop(columns="reward/short").to_parquet(file)

    cases = {
        damaged("a", lambda f: (f / "front.json").write_text("{")): "is no JSON",
        damaged("b", lambda f: (f / "front.json").write_text("[]")): "holds a list",
        damaged("c", without_points): "KeyError: 'points'",
        damaged("d", cut_table): "has other points than it",
        damaged("e", without_column): "has no column 'reward/short'",
        damaged("f", lambda f: (f / "front_samples.parquet").unlink()): "the responses behind",
    }
    for name, message in cases.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            read_methods(["full", name])
