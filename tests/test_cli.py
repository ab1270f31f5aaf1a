"""The command line: configs, overrides, classes of the user's own, the four commands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule

from clp_lightning import CLPModule
from clp_lightning.__main__ import COMMANDS, run
from clp_lightning.cli import main
from tests.runs import Backwards, Counted, Doubled, read_lines, run_config, write_config
from tests.suite import CONFIGS, own_configs, relative


@pytest.fixture
def config(tmp_path: Path, tiny_folder: Callable[..., Path]) -> dict[str, Any]:
    return run_config(tmp_path, tiny_folder())


def build(config: dict[str, Any], folder: Path, *more: str) -> CLPModule:
    path = write_config(folder / "config.yaml", config)
    module = main(["--config", path, *more], run=False).model
    assert isinstance(module, CLPModule)
    return module


def start(*args: str, command: tuple[str, ...] = ("-m", "clp_lightning")) -> Any:
    return subprocess.run([sys.executable, *command, *args], capture_output=True, text=True)


# -- help and mistakes -----------------------------------------------------------------------


def test_help_is_answered_within_a_second() -> None:
    durations = []
    for _ in range(3):
        begin = time.monotonic()
        done = start("--help", command=("-X", "importtime", "-m", "clp_lightning"))
        durations.append(time.monotonic() - begin)
        assert done.returncode == 0
    assert min(durations) < 1
    assert all(command in done.stdout for command in COMMANDS)
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "clp_lightning" in imported
    assert not imported & {"torch", "lightning", "transformers", "numpy", "jsonargparse"}


def test_no_argument_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    run([])
    assert "usage: python -m clp_lightning COMMAND" in capsys.readouterr().out


def test_an_unknown_command_is_told_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        run(["fitt"])
    assert raised.value.code == 2
    assert "no command 'fitt'; the commands are fit, validate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.conditioner.init_args.rnk=4", "Option 'rnk' is not accepted"),
        ("--model.samples_per_promt=4", "Option 'samples_per_promt' is not accepted"),
        ("--model.rewards.kind=Nothing.at.all", "Nothing.at.all"),
        ("--trainer.max_stepz=3", "trainer.max_stepz"),
        ("--model.conditioner=Lora", "Lora"),
    ],
)
def test_a_mistyped_option_is_named(
    option: str,
    message: str,
    config: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises((SystemExit, ValueError)) as raised:
        build(config, tmp_path, option)
    assert message in capsys.readouterr().err + str(raised.value)


def test_a_run_that_is_nowhere(config: dict[str, Any], tmp_path: Path) -> None:
    path = write_config(tmp_path / "config.yaml", config)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*none.last\.ckpt.*a \.ckpt"):
        main(["test", "--config", path, f"--ckpt_path={tmp_path / 'none/last.ckpt'}"])


# -- building --------------------------------------------------------------------------------


# The judge's is for a command without a Trainer, and is tested beside that.
RUNS = sorted(path for path in CONFIGS.rglob("*.yaml") if path.name != "judge.yaml")


@pytest.mark.parametrize("path", RUNS, ids=relative)
def test_config_builds_without_weights(path: Path) -> None:
    """By the command at its top: some files are laid over others."""
    cli = main([f"--config={name}" for name in own_configs(path)], run=False)
    assert isinstance(cli.model, LightningModule)
    assert not cli.model.policy.is_built
    assert not list(cli.model.parameters())


def test_classes_of_the_users_own(config: dict[str, Any], tmp_path: Path) -> None:
    config["model"]["class_path"] = "tests.runs.Doubled"
    config["model"]["init_args"]["conditioner"] = {
        "class_path": "tests.runs.Backwards",
        "init_args": {"mark": "!"},
    }
    module = build(config, tmp_path)
    assert isinstance(module, Doubled)
    assert isinstance(module.policy.conditioner, Backwards)
    assert module.policy.conditioner.mark == "!"
    assert isinstance(module.rewards.rewards["short"], Counted)


def test_overrides_on_the_command_line(config: dict[str, Any], tmp_path: Path) -> None:
    module = build(
        config,
        tmp_path,
        "--model.rewards.short.init_args.target=9",
        "--model.init_args.rewards.short.init_args.letter=q",
        "--model.conditioner.init_args.rank=4",
        "--model.init_args.conditioner.shared_rank=5",
        "--model.pretrained.name=elsewhere",
        "--model.pretrained.dtype=bfloat16",
        "--model.grid.divisions=3",
        "--model.lr=0.5",
        "--seed_everything=8",
    )
    reward: Any = module.rewards.rewards["short"]
    assert (reward.target, reward.letter) == (9, "q")
    conditioner: Any = module.policy.conditioner
    assert (conditioner.rank, conditioner.shared_rank) == (4, 5)
    spec = module.policy.pretrained
    assert (spec.name, spec.dtype) == ("elsewhere", "bfloat16")
    assert module.grid.divisions == 3 and module.grid.alphas == [0.1]  # the rest is as it was
    assert (module.lr, module.seed) == (0.5, 8)
    assert module.rewards.names == ["kind", "short"]


# -- running ---------------------------------------------------------------------------------


def results(folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    checkpoint = torch.load(folder / "run/checkpoints/last.ckpt", weights_only=True)
    return read_front(folder / "run"), checkpoint["state_dict"]


def read_front(folder: Path) -> Any:
    """But for the seconds, which are others every time."""
    front = json.loads((folder / "front.json").read_text())
    assert front["cost"].pop("wall_s") > 0
    return front


def test_print_config_reproduces_the_run(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path / "config.yaml", config)
    more = ["--model.conditioner.init_args.rank=3", "--model.warmup_steps=1"]
    main(["fit", "--config", path, *more])
    front, state = results(tmp_path)

    capsys.readouterr()
    with pytest.raises(SystemExit) as raised:
        main(["fit", "--config", path, *more, "--print_config"])
    assert not raised.value.code
    printed = capsys.readouterr().out
    written = (tmp_path / "run/config.yaml").read_text()
    for name, text in (("printed", printed), ("written", written)):
        again = yaml.safe_load(text)
        folder = tmp_path / name
        again["trainer"]["logger"]["init_args"]["save_dir"] = str(folder)
        folder.mkdir()
        main(["fit", "--config", write_config(folder / "config.yaml", again)])
        found, again_state = results(folder)
        assert found == front
        assert again_state.keys() == state.keys()
        assert all(torch.equal(again_state[key], value) for key, value in state.items())


def test_a_subclassed_module_runs_and_moves(config: dict[str, Any], tmp_path: Path) -> None:
    config["trainer"] |= {"max_steps": 1, "gradient_clip_val": None, "limit_val_batches": 0}
    config["model"]["init_args"]["optimizer"] = {"class_path": "torch.optim.SGD"}
    states = []
    for name in ("CLPModule", "tests.runs.Doubled"):
        config["model"]["class_path"] = name
        main(["fit", "--config", write_config(tmp_path / "config.yaml", config)])
        checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
        states.append(checkpoint["state_dict"])
    once, twice = states
    moved = [key for key in once if "lora_B" in key]  # they start at 0, and so are the steps
    assert moved and all(once[key].abs().max() > 0 for key in moved)
    for key in moved:
        torch.testing.assert_close(twice[key], 2 * once[key])


def test_fit_validate_test_predict(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config["trainer"]["max_steps"] = 4
    config["model"]["init_args"]["eval_samples"] = 2
    path = write_config(tmp_path / "config.yaml", config)
    run_folder = tmp_path / "run"
    fronts = []
    for command in ("fit", "validate", "test"):
        more = [] if command == "fit" else [f"--ckpt_path={run_folder}"]
        main([command, "--config", path, *more])
        out = capsys.readouterr().out
        assert re.findall(r"^front: (.*)$", out, re.MULTILINE) == [str(run_folder / "front.json")]
        fronts.append(read_front(run_folder))
    check_schema(fronts[0], ["kind", "short"], prompts=4, seed=3)
    checkpoint = str(run_folder / "checkpoints/last.ckpt")
    said = [[front.pop(key) for key in ("stage", "checkpoint")] for front in fronts]
    assert said == [["validate", None], ["validate", checkpoint], ["test", checkpoint]]
    assert fronts[0]["global_step"] == 4
    # The same prompts, the same draws, the trained policy: three times the same front.
    assert fronts[0] == fronts[1] == fronts[2]

    main(["predict", "--config", path, f"--ckpt_path={run_folder}"])
    assert "front:" not in capsys.readouterr().out
    records = read_lines(run_folder / "predictions.jsonl")
    assert len(records) == 4 * 3 * 2
    fields = ["prompt_id", "sample", "prompt", "completion", "weights", "alpha", "truncated"]
    assert all(list(record) == [*fields, "rewards"] for record in records)
    ids = [record["prompt_id"] for record in records]
    assert ids == sorted(ids) and len(set(ids)) == 4
    assert [record["weights"] for record in records[:6:2]] == [
        {"kind": 1, "short": 0},
        {"kind": 0.5, "short": 0.5},
        {"kind": 0, "short": 1},
    ]
    prompts = [row["prompt"] for row in read_lines(tmp_path / "rows.jsonl")]
    for record in records:
        assert record["prompt"] == prompts[record["prompt_id"]]
        text = record["completion"]
        assert record["rewards"]["short"] == -abs(sum(c <= "m" for c in text) - 1)
        assert record["alpha"] == 0.1
        share = sum(c.islower() for c in text) / max(len(text), 1)
        assert record["rewards"]["kind"] in {round(share, digits) for digits in (1, 2, 8, 9)}
    # What was predicted is what the front measured.
    point = fronts[0]["points"][1]
    half = [record["rewards"]["kind"] for record in records if record["weights"]["kind"] == 0.5]
    assert abs(point["rewards"]["kind"] - sum(half) / len(half)) < 1e-6


def test_a_run_without_evaluation_prompts_is_resumed_at_its_end_but_not_validated(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config["data"]["init_args"]["holdout"] = 0
    path = write_config(tmp_path / "config.yaml", config)
    main(["fit", "--config", path])
    main(["fit", "--config", path, f"--ckpt_path={tmp_path / 'run'}"])
    with pytest.raises(ValueError, match="no prompts to evaluate on"):
        main(["validate", "--config", path, f"--ckpt_path={tmp_path / 'run'}"])


def check_schema(front: dict[str, Any], names: list[str], *, prompts: int, seed: int) -> None:
    """Against the list of issue and README: which fields there are, and of which kind."""
    top = ["schema", "stage", "checkpoint", "global_step", "seed", "decoding"]
    top += ["rewards", "reference_point", "points", "reference", "metrics"]
    assert list(front)[: len(top)] == top
    cost = front["cost"]
    assert cost["responses"] > 0 and cost["reward_calls"] == cost["responses"] * len(names)
    assert cost["models"] == cost["forwards"] == 1
    assert (front["schema"], front["seed"], front["rewards"]) == (1, seed, names)
    assert front["decoding"]["temperature"] == 1
    assert front["reference_point"] == [-1, -1]
    common = {"rewards", "normalized", "kl", "length", "truncated", "n"}
    assert front["reference"].keys() == common and front["reference"]["kl"] == 0
    for point in front["points"]:
        assert point.keys() == common | {"weights", "alpha", "value", "value_reference"}
        assert list(point["weights"]) == list(point["rewards"]) == list(point["normalized"])
        assert list(point["weights"]) == names and point["n"] == prompts
        signals = (1 - point["alpha"]) * sum(
            point["weights"][name] * point["normalized"][name] for name in names
        ) - point["alpha"] * point["kl"]
        assert abs(point["value"] - signals) < 1e-6
    metrics = front["metrics"]
    assert metrics.keys() >= {"value_gain", "steering_gain", "consistency", "envy"}
    assert metrics.keys() >= {"hypervolume", "mip", "spearman"}
    for name in ("value_gain", "consistency", "envy"):
        assert metrics[name].keys() == {"mean", "low", "high"}
    assert metrics["steering_gain"].keys() == {"mean", "low", "high", "predicted"}
    assert metrics["value_gain"]["low"] <= metrics["value_gain"]["mean"]
    assert [list(entry) for entry in metrics["hypervolume"]] == [["alpha", "value", "reference"]]
    assert list(metrics["spearman"]) == names


def test_supervised_base_is_the_next_runs_base(
    config: dict[str, Any], tmp_path: Path, tiny_folder: Callable[..., Path]
) -> None:
    warm = {
        **config,
        "model": {
            "class_path": "SupervisedModule",
            "init_args": {
                "pretrained": str(tiny_folder()),
                "response_column": "answer",
                "lora_rank": 2,
                "lr": 0.01,
            },
        },
    }
    warm["trainer"] = {**config["trainer"], "callbacks": []}
    warm["trainer"]["logger"] = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(tmp_path), "name": "warm", "version": ""},
    }
    main(["fit", "--config", write_config(tmp_path / "warm.yaml", warm)])
    config["model"]["init_args"]["pretrained"] = str(tmp_path / "warm/base")
    main(["fit", "--config", write_config(tmp_path / "config.yaml", config)])
    assert (tmp_path / "run/front.json").is_file()
