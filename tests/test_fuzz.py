"""Damaged configs and data: a run, or a refusal that names the damage. `make fuzz` tries more."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from clp_lightning.cli import main
from clp_lightning.mistakes import in_short, refuse_no_values
from tests.damage import Trial, mutated, refusal

TYPO = """\
Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'lightning.pytorch.core.module.LightningModule'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'clp_lightning.CLPModule':
        Parser key "rewards":
          Does not validate against any of the Union subtypes
          Errors:
            - Not a valid subclass of Reward
              Subclass types expect one of:
              - a class path (str)
            - Expected a <class 'str'>
          Given value type: <class 'dict'>
          Given value: {'clas_path': 'Brevity'}
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>
  Given value: {'class_path': 'CLPModule'}"""


def test_the_innermost_complaint_is_told() -> None:
    assert in_short(TYPO) == (
        "model (CLPModule) rewards: not a valid Reward; give its class_path, and its arguments as "
        "init_args; got the keys clas_path"
    )
    assert in_short("unrecognized arguments: --x") == "unrecognized arguments: --x"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (["--trainr.max_steps=1"], "trainr"),
        (["--model=no.such.module.Thing"], "'no' importable (pip install, PYTHONPATH)"),
        (["--model=torch.nn.Linear"], "give the class_path of a LightningModule, such as "),
        (["--config", "seed_evrything: 1"], "did you mean 'seed_everything'?"),
        (["--config", "trainer: {max_stps: 1}"], "did you mean 'trainer.max_steps'?"),
    ],
)
def test_a_remedy_is_told(
    damage: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "configs/quickstart.yaml", *damage])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


class Nullable:
    """Of a base class's arguments too."""

    def __init__(self, size: int, name: str | None = None, kind: Literal["a", None] = "a") -> None:
        pass


class Inherits(Nullable):
    def __init__(self, more: float = 0.5, odd: float = math.nan, **kwargs: Any) -> None:
        super().__init__(**kwargs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"size": None},
            r"model\.parts\.0\.init_args\.size is null, but takes int; it has no default",
        ),
        (
            {"more": None},
            r"init_args\.more is null, but takes float; leave the line out .*, 0\.5\.",
        ),
        ({"more": math.nan}, r"model\.parts\.0\.init_args\.more is nan, which is no number"),
        ({"odd": math.nan}, None),  # as by default
        ({"size": 3, "name": None, "kind": None, "unknown": None}, None),
    ],
)
def test_null_is_refused_where_a_class_takes_none(
    arguments: dict[str, Any], message: str | None
) -> None:
    part = {"class_path": f"{__name__}.Inherits", "init_args": arguments}
    config = {"seed": None, "model": {"parts": [part]}}
    if message is None:
        refuse_no_values(config)
        return
    with pytest.raises(ValueError, match=message):
        refuse_no_values(config)


@dataclass
class Sized:
    size: int = 3


def holds(
    one: Annotated[int | None, "a note"] = 3,
    sized: dict[str, Sized] | None = None,
    mode: Literal["a", None] = "a",
    free: dict[str, Any] | int = 3,
    alone: Sized | None = None,
) -> None: ...


def test_null_is_judged_by_the_alternatives_of_a_type() -> None:
    refuse_no_values({"one": None, "mode": None, "sized": {"size": None}}, holds)
    with pytest.raises(ValueError, match="free is null"):
        refuse_no_values({"free": None}, holds)
    with pytest.raises(ValueError, match=r"alone\.size is null, but takes int"):
        refuse_no_values({"alone": {"size": None}}, holds)


@pytest.mark.parametrize(
    ("code", "output", "fault"),
    [
        (0, "", None),
        (2, "a warning\nerror: lr must be above 0\n", None),
        (2, "error: lr is wrong\nSee --help, which you must.\n", "suggests nothing"),
        (2, "error: something is wrong\n", "names none of ['lr']"),
        (2, "error: lr\n" * 9, "9 lines"),
        (1, "error: lr\n", "exit 1"),
        (2, "Traceback (most recent call last)\nerror: lr", "a traceback"),
        (None, "", "not over after 20 s"),
    ],
)
def test_what_a_good_answer_is(code: int | None, output: str, fault: str | None) -> None:
    assert Trial("negative lr", "", ["lr"], "negative", code, output).fault == fault


def test_mutations_are_seeded() -> None:
    config = {"a": {"b": 1, "class_path": "X"}, "c": [0.5, "d/e"]}
    once, again = ([mutated(config, random.Random(5)) for _ in range(2)] for _ in range(2))
    assert [trial.text for trial in once] == [trial.text for trial in again]
    assert refusal("one\n\nerror: two\nthree") == ["error: two", "three"]


# Each once got an answer that did not help: a null, numbers out of range, and too much memory.
ONCE_BAD = [7, 56, 105, 414, 537, 935, 1230]


@pytest.mark.parametrize(
    "numbers",
    [
        ["--configs", "16", "--files", "6", "--further", "8"],
        pytest.param(["--only", *map(str, ONCE_BAD)], marks=pytest.mark.slow),
    ],
)
def test_a_sample(numbers: list[str]) -> None:
    # In a process of its own: children are forked, and this one has threads.
    command = [sys.executable, "-m", "tests.fuzzing", *numbers]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
