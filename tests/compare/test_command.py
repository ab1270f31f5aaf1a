"""What ``compare`` writes and prints, and what a user sees when something is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from clp_lightning.__main__ import run
from clp_lightning.cli import main
from clp_lightning.compare import compare, compare_fronts
from clp_lightning.compare.figure import plot_comparison
from clp_lightning.metrics import Grid
from tests.compare.fronts import COST, write_front
from tests.runs import run_config, write_config


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    random = torch.Generator().manual_seed(0)
    rewards = torch.randn(6, 3, 2, generator=random)
    for seed in range(2):
        write_front(tmp_path / f"lora-{seed}", rewards + seed, seed=seed, closed_gap=[0.5, 0.7])
    write_front(tmp_path / "soups", rewards, units=(0, 2), closed_gap=[0.2, None], unseen=[0, 0.1])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_it_writes(runs: Path, capsys: Any) -> None:
    found = compare(["lora-0", "lora-1", "soups"], "out/here", against="soups")
    assert found["against"] == "soups"
    assert json.loads((runs / "out/here/compare.json").read_text()) == json.loads(json.dumps(found))
    assert (runs / "out/here/compare.png").read_bytes().startswith(b"\x89PNG")

    table = pd.read_csv(runs / "out/here/compare.csv").set_index("method")
    assert table.seeds.to_dict() == {"lora": 2, "soups": 1}
    gain = found["methods"][0]["metrics"]["value_gain"]
    assert table.value_gain["lora"] == pytest.approx(gain["mean"])
    assert table.value_gain_high["lora"] == pytest.approx(gain["high"])
    assert pd.isna(table.p["soups"])
    assert table.p["lora"] == pytest.approx(found["methods"][0]["hypervolume"][0]["p"], abs=1e-3)
    assert table.sampled_tokens.to_dict() == dict.fromkeys(("lora", "soups"), 600)

    text = (runs / "out/here/compare.md").read_text()
    for part in (
        "2 preferences, 6 prompts; max_new_tokens 4, temperature 1.0.",
        "| lora | 2 | 0.6",
        "V minus that of soups",
        "equals that of soups",
        "above (-1, -1)",
        "| lora | 10 | 200 | 600 | 400 | 2 | 7 | 1 | 1 |",
        "in the units of `lora-0` (mean, deviation): kind 0, 1; short 0, 1.",
        "- `soups`: kind 0, 2; short 0, 2",
        "- lora: `lora-0` (seed 0), `lora-1` (seed 1); answered by TransformersEngine",
        "## Closed gap by preference\n\n| kind / short | alpha | lora | soups |",
        "## Closed gap on unseen contexts by preference\n\n| kind / short | alpha | soups |",
    ):
        assert part in text, part
    shown = capsys.readouterr().out
    assert "6 prompts, 95 % intervals" in shown
    assert "hypervolume" in shown
    assert shown.endswith("compare: out/here/compare.md\n")


def test_bold_is_what_the_interval_keeps_from_0(tmp_path: Path) -> None:
    rewards = torch.randn(8, 3, 2, generator=torch.Generator().manual_seed(0))
    write_front(tmp_path / "a", rewards)
    write_front(tmp_path / "b", rewards + torch.tensor([[0.0], [1.0], [0.0]]))
    compare([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "out"))
    lines = (tmp_path / "out/compare.md").read_text().splitlines()
    first = next(line for line in lines if line.startswith("| 1.00 / 0.00 |"))
    second = next(line for line in lines if line.startswith("| 0.00 / 1.00 |"))
    assert first.endswith("| **0.8000 [0.8000, 0.8000]** |")
    assert second.endswith("| 0 |")


def test_bare_arguments_on_the_command_line(runs: Path, capsys: Any) -> None:
    run(["compare", "lora-0", "--out", "one", "x=soups", "--against=x", "lora-1"])
    found = json.loads((runs / "one/compare.json").read_text())
    assert [method["label"] for method in found["methods"]] == ["lora", "x"]
    assert found["against"] == "x"
    capsys.readouterr()
    for args, message in {
        ("lora-0", "nowhere", "--out", "two"): "error: There is no front at nowhere/front.json",
        ("lora-0", "--out", "two", "--against", "full"): "There is no 'full' to test against",
        ("--out", "two"): "runs",
        ("lora-0",): "out",
    }.items():
        with pytest.raises(SystemExit) as stopped:
            run(["compare", *args])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
        assert not (runs / "two").exists()


def test_one_run_alone(runs: Path) -> None:
    compare(["soups"], "out")
    assert "V minus" not in (runs / "out/compare.csv").read_text()


@pytest.mark.parametrize(("k", "fronts"), [(1, 1), (2, 1), (3, 3), (4, 6)])
def test_panels(tmp_path: Path, k: int, fronts: int) -> None:
    names = list("abcd"[:k])
    grid = Grid(2, [0.1, 0.4]).preferences(names)
    random = torch.Generator().manual_seed(0)
    for name in ("one", "two"):
        rewards = torch.randn(5, 1 + len(grid), k, generator=random)
        write_front(tmp_path / name, rewards, 0.3, grid=grid, names=names)
    found = compare_fronts([tmp_path / "one", tmp_path / "two"])
    found["methods"][1]["points"][0]["rewards"]["a"] = {"mean": None, "low": None, "high": None}
    figure = plot_comparison(found)
    axes = [ax for ax in figure.axes if ax.axison]
    assert len(axes) == fronts + 2  # V, and its differences
    labels = [text.get_text() for text in figure.legends[0].texts]
    assert sorted(labels) == ["one", "reference", "two"]
    # By preference: a line for each alpha of both methods, and the reference's.
    assert len(axes[-2].lines) == 2 * 2 + 2
    assert len(axes[-1].lines) == 2 + 1
    x = axes[-2].lines[0].get_xdata()
    assert list(x) == ([1.0, 0.5, 0.0] if k == 2 else list(range(len(grid) // 2)))


def test_a_real_run_and_its_checkpoint(
    tiny_folder: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    config = write_config(tmp_path / "run.yaml", run_config(tmp_path, tiny_folder()))
    main(["fit", "--config", config])
    test = ["test", "--config", config, "--ckpt_path", str(tmp_path / "run")]
    logs = "--trainer.logger.init_args.name=tested"
    main([*test, logs, "--seed_everything=4", "--data.init_args.seed=3"])
    found = compare(
        [f"run={tmp_path / 'run/checkpoints/last.ckpt'}", str(tmp_path / "tested")],
        str(tmp_path / "out"),
    )
    trained, tested = found["methods"]
    assert (trained["label"], tested["label"]) == ("run", "tested")
    assert trained["cost"]["optimizer_steps"] == 2
    assert COST.keys() == trained["cost"].keys() == tested["cost"].keys()
    front = json.loads((tmp_path / "run/front.json").read_text())
    got = [point["value"]["mean"] for point in trained["points"]]
    assert got == pytest.approx([point["value"] for point in front["points"]], rel=1e-5)
    assert trained["hypervolume"][0]["mean"] == pytest.approx(
        front["metrics"]["hypervolume"][0]["value"], rel=1e-5
    )
