from __future__ import annotations

import copy
import functools
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clp_lightning.described import Described, describe, import_path, load_object, settings


class Parent(Described):
    def __init__(self, a: int, b: int = 2) -> None:
        self.total = a + b


class Meter:
    def __init__(self, factor: int) -> None:
        self.factor = factor

    def double(self) -> int:
        return 2 * self.factor


class Passes(Parent):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class Adds(Parent):
    def __init__(self, c: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.total += c


def test_arguments_are_recorded_by_name() -> None:
    assert Parent(1, b=3).init_args == {"a": 1, "b": 3}
    assert Passes(1, b=3).init_args == {"a": 1, "b": 3}
    assert Adds(5, a=1).init_args == {"a": 1, "c": 5}


def test_copies_keep_their_arguments() -> None:
    for made in (copy.deepcopy(Adds(5, a=1)), pickle.loads(pickle.dumps(Adds(5, a=1)))):
        assert made.init_args == {"a": 1, "c": 5}
        assert made.total == 8


def test_describe() -> None:
    assert describe({"x": [Parent(1)], "f": import_path}) == {
        "x": [{"class_path": "tests.test_described.Parent", "init_args": {"a": 1}}],
        "f": "clp_lightning.described.import_path",
    }
    assert describe(lambda: 0) is None
    assert describe(Meter(2).double) is None
    assert describe(math.sqrt) == "math.sqrt"
    assert describe(functools.partial(Parent, b=[1])) == {
        "class_path": "tests.test_described.Parent",
        "init_args": {"b": [1]},
    }
    assert describe(functools.partial(import_path, obj=Parent)) is None
    with pytest.raises(TypeError, match="cannot be described"):
        describe(object())


def test_numbers_arrays_and_paths_become_plain() -> None:
    made = describe([np.float32(0.5), np.float64(0.25), np.int64(3), np.array([1.0, 2.0])])
    assert made == [0.5, 0.25, 3, [1.0, 2.0]]
    assert [type(value) for value in made] == [float, float, int, list]
    assert describe({"a": torch.tensor([[1], [2]]), "b": Path("x/y")}) == {
        "a": [[1], [2]],
        "b": "x/y",
    }


def test_a_wrong_argument_names_the_class() -> None:
    for wrong in (lambda: Parent(1, x=2), lambda: Adds(5, a=1, x=2)):  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="^(Parent|Adds): got an unexpected .* 'x'"):
            wrong()
    with pytest.raises(TypeError, match="Parent: too many positional"):
        Parent(1, 2, 3)  # type: ignore[call-arg]


def test_settings_hold_the_defaults() -> None:
    assert settings(Parent(1)) == settings(Parent(a=1, b=2))
    assert settings(Adds(5, a=1))["init_args"] == {"a": 1, "b": 2, "c": 5}
    assert settings(Parent(1)) != settings(Parent(1, b=3))


def test_objects_by_path() -> None:
    assert load_object("clp_lightning.described.Described") is Described
    with pytest.raises(ValueError, match="has no 'Nothing'"):
        load_object("clp_lightning.described.Nothing")
    with pytest.raises(ValueError, match="full path"):
        load_object("nowhere")
