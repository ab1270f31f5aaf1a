"""The rivals on the exact task: each trained by ``fit`` and judged by the ordinary ``test``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from clp_lightning.cli import main
from tests.runs import write_config

CONFIG = Path(__file__).parents[2] / "configs" / "exact" / "lora.yaml"
TASK = {"class_path": "ExactTask", "init_args": {"num_contexts": 2}}
REWARDS = {
    name: {"class_path": "ExactReward", "init_args": {"index": i, "task": TASK}}
    for i, name in enumerate(["first", "second"])
}
ALPHA = {"class_path": "FixedAlpha", "init_args": {"alpha": 0.1}}
VERTICES = {"weights": {"class_path": "Vertices"}, "alpha": ALPHA, "per": "step"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the base, which the first run trains."""
    return tmp_path_factory.mktemp("rivals")


def run(root: Path, name: str, model: dict[str, Any], callback: dict[str, Any]) -> None:
    """Two steps of ``fit`` into ``root / name``; the config stands beside it."""
    config = yaml.safe_load(CONFIG.read_text())
    base = str(root / "base")
    config["trainer"] |= {"max_steps": 2, "val_check_interval": 2, "limit_val_batches": 0}
    config["trainer"]["logger"]["init_args"] |= {"save_dir": str(root), "name": name}
    config["trainer"]["callbacks"][0]["init_args"] |= callback
    model = {"grid": {"divisions": 2, "alphas": [0.1]}, "lr": 0.05, "rewards": REWARDS} | model
    config["model"]["init_args"] |= {"pretrained": base, "eval_samples": 4} | model
    config["data"]["init_args"] |= {"folder": base, "batch_size": 8, "task": TASK}
    main(["fit", "--config", write_config(root / f"{name}.yaml", config)])


def measure(root: Path, name: str, *overrides: str) -> dict[str, Any]:
    """The front that the ordinary ``test`` of a run writes."""
    config, ckpt = str(root / f"{name}.yaml"), str(root / name)
    place = ["--trainer.logger.init_args.name", f"{name}-tested", "--trainer.limit_val_batches=1.0"]
    main(["test", "--config", config, "--ckpt_path", ckpt, *place, *overrides])
    front: dict[str, Any] = json.loads((root / f"{name}-tested" / "front.json").read_text())
    return front


@pytest.fixture(scope="module")
def soups(root: Path) -> tuple[Path, dict[str, Any]]:
    """A run of Rewarded Soups and its front."""
    run(root, "soups", {"conditioner": {"class_path": "Mixture"}}, VERTICES)
    return root, measure(root, "soups")


def gaps(front: dict[str, Any]) -> list[float]:
    points: list[float] = front["metrics"]["closed_gap"]["points"]
    return points


def test_rewarded_soups(soups: tuple[Path, dict[str, Any]]) -> None:
    _, front = soups
    assert len(gaps(front)) == 3 and all(gap != 0 for gap in gaps(front))
    assert front["metrics"]["steering_gain"]["mean"] is not None


def test_mod(soups: tuple[Path, dict[str, Any]]) -> None:
    root, front = soups
    mixed = measure(root, "soups", "--model.init_args.engine", "MOD")
    first, centre, second = gaps(mixed)
    assert [first, second] == pytest.approx([gaps(front)[0], gaps(front)[2]], abs=1e-5)
    assert abs(centre - gaps(front)[1]) > 1e-4
    assert mixed["cost"]["forwards"] == 2
    assert mixed["decoding"]["engine"] == "MOD"


def test_dera(soups: tuple[Path, dict[str, Any]]) -> None:
    root, _ = soups
    grid = ("--model.init_args.grid.alphas", "[0.1, 0.4]")
    plain = measure(root, "soups", *grid)
    engine = ("--model.init_args.engine", "DeRa", "--model.init_args.engine.alpha_min", "0.1")
    mixed = measure(root, "soups", *grid, *engine)
    assert gaps(mixed)[:3] == pytest.approx(gaps(plain)[:3], abs=1e-5)  # lambda = 1
    assert all(abs(a - b) > 1e-4 for a, b in zip(gaps(mixed)[3:], gaps(plain)[3:], strict=True))


def test_the_oracle_of_one_weighting(root: Path) -> None:
    asked = {"first": 0.25, "second": 0.75}
    fixed = {"class_path": "Fixed", "init_args": {"weights": asked}}
    grid = {"alphas": [0.1], "weights": [asked]}
    model = {"conditioner": {"class_path": "Mixture"}, "grid": grid}
    run(root, "oracle", model, {"weights": fixed, "alpha": ALPHA})
    front = measure(root, "oracle")
    assert [point["weights"] for point in front["points"]] == [pytest.approx(asked)]
    assert len(gaps(front)) == 1 and gaps(front)[0] != 0
    assert front["metrics"]["steering_gain"]["mean"] is None  # one point is no dial


@pytest.mark.parametrize("conditioner", ["Mixture", "LoRA", "SoftPrompt"])
def test_one_reward_and_many_alphas(root: Path, conditioner: str) -> None:
    alpha = {"class_path": "UniformAlpha", "init_args": {"low": 0.05, "high": 0.5}}
    rewards = {"first": REWARDS["first"]}
    model = {"conditioner": {"class_path": conditioner}, "rewards": rewards}
    run(root, conditioner, model, {"alpha": alpha})
    engines = [[], ["--model.init_args.engine", "MOD"], ["--model.init_args.engine", "DeRa"]]
    for engine in engines[: 3 if conditioner == "Mixture" else 1]:
        front = measure(root, conditioner, "--model.init_args.grid.alphas", "[0.1, 0.4]", *engine)
        assert len(front["points"]) == 2 and all(gap != 0 for gap in gaps(front))
        assert front["metrics"]["steering_gain"]["mean"] is not None  # alpha is the dial
    front = measure(root, conditioner)
    assert len(front["points"]) == 1
    assert front["metrics"]["steering_gain"]["mean"] is None
    assert front["metrics"]["consistency"]["mean"] is None
