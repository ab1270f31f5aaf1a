"""A run that is killed and resumed ends where the uninterrupted one does, bit by bit."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clp_lightning.cli import main
from tests.processes import in_child
from tests.runs import read_lines, run_config, write_config

MAX_STEPS, BATCHES_PER_STEP = 10, 2  # a pass over the data has 4 steps


def training_records(path: Path) -> list[dict[str, Any]]:
    """What was sampled for training: statistics and fronts have epochs of their own."""
    return [record for record in read_lines(path) if record["epoch"] < 2**31]


def config_of(folder: Path, base: Path, every: int = 3) -> str:
    config = run_config(folder, base, max_steps=MAX_STEPS)
    config["trainer"]["callbacks"][2]["init_args"]["every_n_train_steps"] = every
    config["model"]["init_args"]["optimizer"] = {"class_path": "MuonAdamW"}  # AdamW is a part
    config["model"]["init_args"]["lr_scheduler"] = {
        "class_path": "torch.optim.lr_scheduler.CosineAnnealingLR",
        "init_args": {"T_max": MAX_STEPS},
    }
    return write_config(folder / "config.yaml", config)


def fit(config: str, record: Path, *more: str) -> int:
    engine = ["--model.engine=tests.runs.Recorder", f"--model.engine.path={record}"]
    return in_child(main, ["fit", "--config", config, *engine, *more])


def kill(where: str, step: int) -> list[str]:
    return [
        "--trainer.callbacks+=tests.processes.Kill",
        f"--trainer.callbacks.where={where}",
        f"--trainer.callbacks.step={step}",
    ]


def same(a: Any, b: Any) -> bool:
    """Equal in every bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.fixture(scope="module")
def whole(
    tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Records and last checkpoint of the run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert fit(config_of(folder, tiny_folder()), folder / "record") == 0
    records = training_records(folder / "record")
    assert len(records) == MAX_STEPS * BATCHES_PER_STEP
    checkpoint = torch.load(folder / "run/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == MAX_STEPS
    return records, checkpoint


@pytest.mark.parametrize(
    ("where", "step", "every", "saved", "by"),
    [
        ("train", 5, 3, 3, "folder"),  # in mid-epoch, two steps after the checkpoint
        ("epoch", 4, 4, 4, "folder"),  # at the end of a pass, the checkpoint just written
        ("epoch", 8, 3, 6, "last"),  # at the end of a pass, the checkpoint in its middle
        ("validation", 8, 3, 6, "folder"),
        ("validation", 6, 3, 6, "last"),  # the checkpoint written between step and validation
    ],
)
def test_resumed_run_ends_in_the_same_bits(
    where: str,
    step: int,
    every: int,
    saved: int,
    by: str,
    whole: tuple[list[dict[str, Any]], dict[str, Any]],
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    records, expected = whole
    config = config_of(tmp_path, tiny_folder(), every)
    assert fit(config, tmp_path / "first", *kill(where, step)) == -signal.SIGKILL
    run = tmp_path / "run"
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == saved

    ckpt = str(run) if by == "folder" else "last"
    assert fit(config, tmp_path / "second", f"--ckpt_path={ckpt}") == 0

    first, second = training_records(tmp_path / "first"), training_records(tmp_path / "second")
    assert first == records[: len(first)]
    assert second == records[saved * BATCHES_PER_STEP :]
    assert_same_end(run, expected)
    assert (run / "front.json").is_file()


def assert_same_end(run: Path, expected: dict[str, Any]) -> None:
    found = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert same(found[key], expected[key]), key
    costs = [checkpoint["clp_lightning_cost"]["counts"] for checkpoint in (found, expected)]
    assert costs[0] == costs[1] and costs[0]["optimizer_steps"] == MAX_STEPS


def test_killed_again_within_the_first_step_after_a_resume(
    whole: tuple[list[dict[str, Any]], dict[str, Any]],
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    # A checkpoint between the two batches of a step would lose the first one's gradient.
    config, run = config_of(tmp_path, tiny_folder()), tmp_path / "run"
    assert fit(config, tmp_path / "first", *kill("train", 4)) == -signal.SIGKILL
    again = [f"--ckpt_path={run}"]
    assert fit(config, tmp_path / "second", *kill("window", 3), *again) == -signal.SIGKILL
    assert fit(config, tmp_path / "third", *again) == 0
    assert training_records(tmp_path / "third") == whole[0][3 * BATCHES_PER_STEP :]
    assert_same_end(run, whole[1])


def test_averages_of_the_weights_go_on(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_folder()
    average = "--trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging"
    for name, killed in (("whole", False), ("killed", True)):
        more = [average, "--trainer.max_steps=6", "--ckpt_path=last"]
        config, record = config_of(tmp_path / name, base), tmp_path / name / "record"
        if killed:
            assert fit(config, record, *kill("train", 5), *more) == -signal.SIGKILL
        assert fit(config, record, *more) == 0
    one, two = (
        torch.load(tmp_path / name / "run/checkpoints/last.ckpt", weights_only=True)
        for name in ("whole", "killed")
    )
    for key in ("state_dict", "current_model_state", "averaging_state", "optimizer_states"):
        assert same(one[key], two[key]), key
    assert one["state_dict"].keys() == one["current_model_state"].keys()  # and not the base
    assert not same(one["state_dict"], one["current_model_state"])
    fronts = [
        json.loads((tmp_path / name / "run/front.json").read_text())["points"]
        for name in ("whole", "killed")
    ]
    for own, other in zip(*fronts, strict=True):
        assert own["rewards"] == other["rewards"]
        # An average of the frozen base, too, is off by rounding: more and more, until a resume.
        assert own["kl"] == pytest.approx(other["kl"], abs=1e-4)
