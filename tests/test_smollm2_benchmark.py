"""The configs of the benchmark on SmolLM2: alike in all that is not the method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

METHODS = sorted(Path("configs/smollm2").glob("*.yaml"))
# What the quickstart shows beside its method; these leave alone what is trained and measured.
WATCHING = ("Watchmen", "EarlyStopping", "ModelCheckpoint")


def read(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(path.read_text())
    return config


def budget(config: dict[str, Any]) -> dict[str, Any]:
    """The config without the method: conditioner, learning rates, sampler of weights, name."""
    for name in ("conditioner", "lr", "lr_shared"):
        config["model"]["init_args"].pop(name, None)
    sampler = config["trainer"]["callbacks"][0]["init_args"]
    del sampler["weights"], config["trainer"]["logger"]["init_args"]["name"]
    sampler.pop("per", None)
    callbacks = config["trainer"]["callbacks"]
    config["trainer"]["callbacks"] = [
        callback for callback in callbacks if not callback["class_path"].endswith(WATCHING)
    ]
    return config


def test_there_are_four_methods_beside_the_quickstart() -> None:
    assert [path.stem for path in METHODS] == ["attention", "prompt", "soft_prompt", "soups"]


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_rewards_data_and_budget_are_the_quickstarts(path: Path) -> None:
    assert budget(read(path)) == budget(read(Path("configs/quickstart.yaml")))


def test_soups_train_one_corner_a_step() -> None:
    soups = read(Path("configs/smollm2/soups.yaml"))
    quickstart = read(Path("configs/quickstart.yaml"))
    sampler = soups["trainer"]["callbacks"][0]["init_args"]
    assert (sampler["weights"]["class_path"], sampler["per"]) == ("Vertices", "step")
    for name in ("conditioner", "lr"):
        assert soups["model"]["init_args"][name] == quickstart["model"]["init_args"][name]
