"""The `pick` command."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clp_lightning import Preference, RewardBank, RunCheckpoint
from clp_lightning.__main__ import run
from clp_lightning.cli import main
from clp_lightning.pick import Measured, Meter
from clp_lightning.pick.search import parse_wishes
from tests.helpers import prompt_batch
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
from tests.steerables import make_steerable

PROMPTS = ["tea", "a long walk", "fog?", "ink and owls", "x", "jam"]


@pytest.fixture
def meter(tiny_folder: Callable[..., Path]) -> Meter:
    bank = RewardBank({"kind": kind, "short": Counted()})
    return Meter(make_steerable(tiny_folder()), bank, prompt_batch(PROMPTS), samples=2, rows=5)


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


@pytest.mark.slow
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
