"""Killed at any moment and resumed, a run ends where the uninterrupted one does, bit by bit."""

from __future__ import annotations

import csv
import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clp_lightning.cli import main
from tests.killing import MOMENTS, PHASES
from tests.processes import in_child
from tests.runs import read_lines, run_config, write_config
from tests.test_resume import same

STEPS = 12  # three passes over the data
LIMITS = {"rollout": 4, "backward": 4, "validation": 12} | dict.fromkeys(
    ["statistics", "optimizer", "checkpoint"], 2
)
CHAINS = 8


def config_of(folder: Path, base: Path) -> str:
    config = run_config(folder, base, max_steps=STEPS, val_check_interval=6)  # every three steps
    tensorboard = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": str(folder), "name": "run", "version": ""},
    }
    config["trainer"]["logger"] = [config["trainer"]["logger"], tensorboard]
    config["trainer"]["callbacks"][2]["init_args"]["every_n_train_steps"] = 2
    config["data"]["init_args"]["eval_batch_size"] = 1
    return write_config(folder / "config.yaml", config)


def fit(folder: Path, base: Path, number: int, kill: list[str], limit: float = 0) -> int:
    """One process of a run; ``last`` loads nothing where there is nothing yet."""
    args = ["fit", "--config", config_of(folder, base), "--ckpt_path=last", *kill]
    record = folder / f"record-{number}"
    args += ["--model.engine=tests.runs.Recorder", f"--model.engine.path={record}"]
    return in_child(main, args, kill_after=limit)


def at(phase: str, entry: int, moment: str = "half") -> list[str]:
    return [
        "--trainer.callbacks+=tests.killing.KillAt",
        f"--trainer.callbacks.phase={phase}",
        f"--trainer.callbacks.entry={entry}",
        f"--trainer.callbacks.moment={moment}",
    ]


def tokens(folder: Path) -> dict[tuple[int, ...], Any]:
    """What was sampled for each batch; equal batches must agree, whoever sampled them."""
    found: dict[tuple[int, ...], Any] = {}
    for path in folder.glob("record-*"):
        for record in read_lines(path):
            key = (record["epoch"], *record["prompt_ids"])
            if record["epoch"] < 2**31:
                assert found.setdefault(key, record) == record
    return found


def front(folder: Path) -> Any:
    found = json.loads((folder / "run/front.json").read_text())
    del found["cost"]["wall_s"], found["checkpoint"]
    return found


def logged(folder: Path) -> tuple[list[Any], list[Any]]:
    """Steps with their names, of the CSV file and of TensorBoard."""
    with (folder / "run/metrics.csv").open(newline="") as file:
        rows = [(int(r["step"]), name) for r in csv.DictReader(file) for name in r if r[name]]
    events = EventAccumulator(str(folder / "run"), size_guidance={"scalars": 0}).Reload()
    names = events.Tags()["scalars"]
    scalars = [(event.step, name) for name in names for event in events.Scalars(name)]
    return [e for e in rows if _is_of_a_step(e[1])], [e for e in scalars if _is_of_a_step(e[1])]


def _is_of_a_step(name: str) -> bool:
    """Not of the run; and in every step: else Lightning repeats the value of an earlier one."""
    return name not in ("step", "epoch", "hp_metric") and "reward_by_weight" not in name


@pytest.fixture(scope="module")
def whole(
    tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, float]:
    """Folder and seconds of the run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    begun = time.monotonic()
    assert fit(folder, tiny_folder(), 0, []) == 0
    assert len(tokens(folder)) == STEPS * 2
    return folder, time.monotonic() - begun


def assert_same_end(folder: Path, expected: Path) -> None:
    found, wanted = (
        torch.load(path / "run/checkpoints/last.ckpt", weights_only=True)
        for path in (folder, expected)
    )
    for key in ("state_dict", "optimizer_states", "global_step"):
        assert same(found[key], wanted[key]), key
    assert tokens(folder) == tokens(expected)
    assert front(folder) == front(expected)
    for here, there in zip(logged(folder), logged(expected), strict=True):
        assert max(Counter(here).values()) == 1, Counter(here).most_common(3)
        assert set(here) <= set(there)
        # Lightning logs a step after its checkpoint, at every second step: a kill may come between.
        # A validation is made up for, save that of the last step, whose place the last front takes.
        for step, name in set(there) - set(here):
            assert step % 2 and (name.startswith("train") or step == STEPS - 1), (step, name)
    left = {path.name for path in (folder / "run/checkpoints").iterdir()}
    assert left <= {"last.ckpt", "previous.ckpt", ".last.ckpt.partial"}


def test_killed_in_a_validation_and_in_a_checkpoint(
    whole: tuple[Path, float], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    # The second validation, of 8 samplings each, follows the checkpoint of the same step.
    for number, kill in enumerate([at("validation", 10), at("checkpoint", 1)]):
        assert fit(tmp_path, tiny_folder(), number, kill) == -signal.SIGKILL
    assert fit(tmp_path, tiny_folder(), 2, []) == 0
    assert_same_end(tmp_path, whole[0])


@pytest.mark.slow
def test_fifty_kills(
    whole: tuple[Path, float], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    killed: Counter[str] = Counter()
    for chain in range(CHAINS):
        draw, folder = random.Random(chain), tmp_path / str(chain)
        later = PHASES[1:]
        draw.shuffle(later)
        for number, phase in enumerate(["statistics", *later, "any"]):
            if phase == "any":
                status = fit(folder, tiny_folder(), number, [], draw.uniform(0, whole[1]))
            else:
                kill = at(phase, draw.randint(1, LIMITS[phase]), draw.choice(MOMENTS))
                status = fit(folder, tiny_folder(), number, kill)
            assert status in (0, -signal.SIGKILL)
            killed[phase] += status != 0
        assert fit(folder, tiny_folder(), 99, []) == 0
        assert_same_end(folder, whole[0])
    assert killed.total() >= 50 and min(killed[phase] for phase in PHASES) >= 5, killed
