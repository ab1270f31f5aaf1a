"""Damaged checkpoints, a preempted job, a full disk: nothing is lost, and one message says it."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from clp_lightning import RunCheckpoint
from clp_lightning.__main__ import run
from clp_lightning.checkpoints import checkpoint_file
from clp_lightning.modules.checkpoint import DurableCheckpointIO
from tests.processes import in_child
from tests.runs import make_data, make_module, make_trainer, run_config, write_config
from tests.test_resume import same

STEPS = 6


def config_of(folder: Path, base: Path, **trainer: Any) -> str:
    config = run_config(folder, base, max_steps=STEPS, limit_val_batches=0, **trainer)
    config["trainer"]["callbacks"][2]["init_args"]["every_n_train_steps"] = 2
    return write_config(folder / "config.yaml", config)


def read(run: Path, name: str = "last.ckpt") -> dict[str, Any]:
    found: dict[str, Any] = torch.load(run / "checkpoints" / name, weights_only=True)
    return found


def assert_same_end(run: Path, expected: dict[str, Any]) -> None:
    found = read(run)
    for key in ("state_dict", "optimizer_states", "global_step"):
        assert same(found[key], expected[key]), key


@pytest.fixture(scope="module")
def whole(
    tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The last checkpoint of the run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert in_child(run, ["fit", "--config", config_of(folder, tiny_folder())]) == 0
    names = {path.name for path in (folder / "run/checkpoints").iterdir()}
    assert names == {"last.ckpt", "previous.ckpt"}
    assert read(folder / "run", "previous.ckpt")["global_step"] == STEPS - 2
    return read(folder / "run")


class Also(Callback):
    """At step 5, before anything is saved: does to the process what ``what`` says.

    Args:
        what: ``kill``; ``preempt`` (SIGTERM, in the middle of the step before); ``limit`` (no file
            may grow); ``fill`` (a file that leaves no room on the disk).
        folder: Where the file goes.
    """

    def __init__(self, what: str, folder: str = "") -> None:
        self.what, self.folder = what, folder

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 4 and self.what == "preempt":
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step != 5:
            return
        if self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        if self.what == "fill":
            with open(f"{self.folder}/filler", "wb", buffering=0) as file:
                for size in (4096, 1):
                    try:
                        while True:
                            file.write(bytes(size))
                    except OSError:
                        pass


def also(what: str, folder: Path | str = "") -> list[str]:
    name = "--trainer.callbacks"
    return [f"{name}+=tests.test_crash.Also", f"{name}.what={what}", f"{name}.folder={folder}"]


# -- damaged -------------------------------------------------------------------------------------


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {
            "truncated": content[:middle],
            "empty": b"",
            "zeros": content[:middle] + bytes(100) + content[middle + 100 :],  # in some tensor
        }[how]
    )


@pytest.mark.parametrize(("how", "by"), [("truncated", "last"), ("zeros", "last"), ("empty", "")])
def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(
    how: str,
    by: str,
    whole: dict[str, Any],
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    config = config_of(tmp_path, tiny_folder())
    assert in_child(run, ["fit", "--config", config, *also("kill")]) == -signal.SIGKILL
    folder = tmp_path / "run/checkpoints"
    damage(folder / "last.ckpt", how)
    again = ["fit", "--config", config, f"--ckpt_path={by or tmp_path / 'run'}"]
    # A second crash finds the good one in its place, whatever stands in the last.
    assert in_child(run, [*again, *also("kill")]) == -signal.SIGKILL
    assert read(tmp_path / "run", "previous.ckpt")["global_step"] == 2
    assert read(tmp_path / "run")["global_step"] == 4
    assert in_child(run, again) == 0
    assert_same_end(tmp_path / "run", whole)


def test_it_is_told(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = RunCheckpoint(every_n_train_steps=1)
    make_trainer(tmp_path, checkpoint).fit(make_module(tiny_folder()), make_data(tmp_path))
    last, previous = (tmp_path / "checkpoints" / f"{n}.ckpt" for n in ("last", "previous"))
    damage(last, "truncated")
    message = rf"{last} is damaged; {previous}, the one before it, is taken"
    trainer = make_trainer(tmp_path, RunCheckpoint())
    with pytest.warns(UserWarning, match=message):
        trainer.fit(make_module(tiny_folder()), make_data(tmp_path), ckpt_path="last")
    assert trainer.global_step == 2
    damage(last, "truncated")
    (tmp_path / "checkpoints").rename(tmp_path / "moved")
    (tmp_path / "run").mkdir()
    (tmp_path / "moved").rename(tmp_path / "run/checkpoints")
    with pytest.warns(UserWarning, match="is damaged; .*previous.ckpt, the one before"):
        assert checkpoint_file(tmp_path / "run").name == "previous.ckpt"
    damage(tmp_path / "run/checkpoints/previous.ckpt", "truncated")
    with pytest.raises(ValueError, match=r"last\.ckpt cannot be read"):
        checkpoint_file(tmp_path / "run")


def test_what_an_earlier_run_left_is_no_predecessor(tmp_path: Path) -> None:
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    for number in range(2):
        plugin = DurableCheckpointIO()
        plugin.save_checkpoint({"run": number, "save": 0}, last)
        assert not previous.exists()
        plugin.save_checkpoint({"run": number, "save": 1}, last)
        assert torch.load(previous) == {"run": number, "save": 0}
    resumed = DurableCheckpointIO()
    resumed.load_checkpoint(last)
    resumed.save_checkpoint({"run": 1, "save": 2}, last)
    assert [torch.load(path)["save"] for path in (previous, last)] == [1, 2]
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "previous.ckpt"}


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("not on this file system")

    monkeypatch.setattr(os, "link", refuse)
    plugin, last = DurableCheckpointIO(), tmp_path / "last.ckpt"
    for number in range(3):
        plugin.save_checkpoint({"save": number}, last)
    assert torch.load(tmp_path / "previous.ckpt") == {"save": 1}


# -- preempted -----------------------------------------------------------------------------------


def test_sigterm_saves_and_leaves(
    whole: dict[str, Any], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    config = config_of(tmp_path, tiny_folder())
    command = ["fit", "--config", config, "--ckpt_path=last"]
    assert in_child(run, [*command, *also("preempt")]) == 128 + signal.SIGTERM
    # Told at the first of the two batches of step 5, and step 5 is no multiple of 2.
    assert read(tmp_path / "run")["global_step"] == 5
    assert in_child(run, command) == 0
    assert_same_end(tmp_path / "run", whole)


def test_sigterm_at_any_moment(
    whole: dict[str, Any], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """While it starts it may die of it, or end before it comes; the next ones go on."""
    command = ["fit", "--config", config_of(tmp_path, tiny_folder()), "--ckpt_path=last"]
    for wait in (1.0, 2.0, 4.0):
        status = in_child(run, command, kill_after=wait, by=signal.SIGTERM)
        assert status in (128 + signal.SIGTERM, -signal.SIGTERM, 0)
    assert in_child(run, command) == 0
    assert_same_end(tmp_path / "run", whole)


# -- no room -------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def told(path: Path) -> str:
    """The one line that says what is wrong."""
    (line,) = re.findall(r"^error: .*$", path.read_text(), re.MULTILINE)
    return str(line)


def silent(args: list[str], output: Path) -> None:
    sys.stdout = sys.stderr = output.open("w", buffering=1)
    run(args)


def check_no_room(what: str, folder: Path, base: Path, expected: dict[str, Any]) -> None:
    config, output = config_of(folder, base), folder.parent / "output"
    command = ["fit", "--config", config, "--ckpt_path=last"]
    assert in_child(silent, [*command, *also(what, folder)], output) == 2
    assert re.search(
        r"last\.ckpt could not be written: .*The one before it is untouched\. Make room",
        told(output),
    )
    assert read(folder / "run")["global_step"] == 4
    assert not [*(folder / "run/checkpoints").glob(".*")]
    (folder / "filler").unlink(missing_ok=True)
    assert in_child(run, command) == 0
    assert_same_end(folder / "run", expected)


def test_a_file_that_may_not_grow(
    whole: dict[str, Any], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    check_no_room("limit", tmp_path / "runs", tiny_folder(), whole)


def test_a_full_disk(whole: dict[str, Any], tiny_folder: Callable[..., Path], disk: Path) -> None:
    check_no_room("fill", disk, tiny_folder(), whole)


def test_a_folder_that_cannot_be_written(
    tiny_folder: Callable[..., Path], disk: Path, tmp_path: Path
) -> None:
    config = config_of(tmp_path, tiny_folder())
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    other = f"--trainer.logger.init_args.save_dir={disk}/logs"
    begun = time.monotonic()
    assert in_child(silent, ["fit", "--config", config, other], tmp_path / "output") == 2
    assert time.monotonic() - begun < 60
    line = told(tmp_path / "output")
    assert f"Read-only file system: '{disk}/logs" in line and "save_dir" in line
