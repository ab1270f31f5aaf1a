"""The suites for large models: their headers, and two steps of every one on small stand-ins.

That every file is built without weights by the command at its top is tested in test_cli.py.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from clp_lightning import CLPCallback
from clp_lightning.cli import main
from tests.suite import (
    CONFIGS,
    SUITE,
    commands,
    expectation,
    field,
    make_stand_ins,
    own_configs,
    relative,
)

FAST = ["quality.yaml", "2_rouge.yaml"]
# Without the package that reads it, all of that file but the number format is run.
ON_GPU = torch.cuda.is_available() and find_spec("bitsandbytes")
PLAIN = [] if ON_GPU else ["--model.pretrained=Qwen/Qwen2.5-7B-Instruct"]
STEPS = ["--trainer.max_steps=2", "--trainer.accelerator=cpu"]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


# -- headers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SUITE, ids=relative)
def test_the_header_says_command_hardware_and_what_is_expected(path: Path) -> None:
    assert path.read_text().startswith("# ")
    assert any(relative(path) in command for command in commands(path))
    assert own_configs(path)[-1] == relative(path)
    assert all((CONFIGS.parent / name).is_file() for name in own_configs(path))
    assert len(field(path, "hardware")) == len(field(path, "not measured yet")) == 1
    expected = expectation(path)
    assert expected.keys() == {"minutes", "metric", "bound"}
    assert isinstance(expected["minutes"], int) and expected["minutes"] > 0
    assert re.fullmatch(r"(val|test)/\w+", expected["metric"])
    assert re.fullmatch(r"[<>] -?\d+(\.\d+)?", expected["bound"])


def test_every_prerequisite_is_a_file_of_the_suite() -> None:
    needed = {name for path in SUITE for name in field(path, "needs")}
    assert needed <= {relative(path) for path in SUITE}
    assert len(needed) >= 4


@pytest.mark.parametrize(
    ("task", "overlay"),
    [(task, path) for path in SUITE for said in field(path, "on") for task in said.split(", ")],
    ids=lambda value: value if isinstance(value, str) else relative(value),
)
def test_an_overlay_is_built_on_every_experiment_that_it_names(task: str, overlay: Path) -> None:
    base = CONFIGS / f"summarization/{task}.yaml"
    plain, laid = (
        main([f"--config={path}" for path in paths] + STEPS[1:], run=False)
        for paths in ([base], [base, overlay])
    )
    assert laid.trainer.log_dir.startswith(f"runs/summarization/{task}/")
    assert laid.trainer.log_dir != plain.trainer.log_dir
    assert laid.model.rewards.names == plain.model.rewards.names
    assert laid.datamodule.batch_size == plain.datamodule.batch_size
    # Fronts of one experiment are of the same preferences, except an oracle's.
    if overlay.name != "oracle.yaml":
        assert laid.model.grid == plain.model.grid
    ends = [
        callback.alpha.bounds
        for cli in (plain, laid)
        for callback in cli.trainer.callbacks
        if isinstance(callback, CLPCallback)
    ]
    assert len(ends) == 2 and (ends[0] == ends[1]) is (overlay.name != "alpha_min.yaml")


# -- two steps -------------------------------------------------------------------------------


class Workplace:
    """A folder with stand-ins, in which commands are run as they are written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics: dict[str, set[str]] = {}

    def run(self, path: Path) -> set[str]:
        """Runs a config's commands, those of its prerequisites first; names of what was logged."""
        name = relative(path)
        if name not in self.metrics:
            for needed in field(path, "needs"):
                self.run(CONFIGS.parent / needed)
            for command in commands(path):
                steps = STEPS if command[0] == "fit" else STEPS[1:]
                plain = PLAIN if path.name == "4bit.yaml" else []
                cli = main([*command, *steps, *plain, *QUIET])
                self.check(cli)
            self.metrics[name] = set(cli.trainer.logged_metrics)
        return self.metrics[name]

    def check(self, cli: Any) -> None:
        folder = Path(cli.trainer.log_dir)
        if cli.subcommand == "fit":
            assert cli.trainer.global_step == 2
        written = {"SupervisedModule": "base", "RewardModule": "reward"}
        kind = type(cli.model).__name__
        assert (folder / written.get(kind, "front.json")).exists()
        if kind in written:  # two steps end before the first validation
            cli.trainer.validate(cli.model, cli.datamodule, verbose=False)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("suite")
    (folder / "configs").symlink_to(CONFIGS)
    make_stand_ins(folder)
    return Workplace(folder)


@pytest.fixture
def workplace(shared: Workplace, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    monkeypatch.chdir(shared.folder)
    return shared


@pytest.mark.parametrize(
    "path",
    [p if p.name in FAST else pytest.param(p, marks=pytest.mark.slow) for p in SUITE],
    ids=relative,
)
def test_two_steps(path: Path, workplace: Workplace) -> None:
    assert expectation(path)["metric"] in workplace.run(path)
