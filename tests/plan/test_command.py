"""``python -m clp_lightning plan``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clp_lightning.__main__ import run
from tests.runs import run_config, write_config

THERE = {"accelerator": "gpu", "devices": 4, "num_nodes": 2}  # a machine that this one is not


def sharded_over(size: Any, products: Any = 1) -> dict[str, Any]:
    """A strategy of a config."""
    sizes = {"data_parallel_size": size, "tensor_parallel_size": products}
    return {
        "class_path": "ModelParallelStrategy",
        "init_args": {**sizes, "save_distributed_checkpoint": False},
    }


def planned(capsys: pytest.CaptureFixture[str], *args: str) -> dict:
    run(["plan", *args, "--json"])
    return json.loads(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The line in which a command says what is wrong."""
    with pytest.raises(SystemExit) as end:
        run([*args])
    assert end.value.code == 2
    (line,) = [said for said in capsys.readouterr().err.splitlines() if said.startswith("error:")]
    return line


def test_table_devices_and_verdict(
    tiny_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = {**THERE, "precision": "bf16-true"}
    config = run_config(tmp_path, tiny_folder(), strategy=sharded_over(8), **there)
    path = write_config(tmp_path / "run.yaml", config)
    sharded = planned(capsys, "--config", path)
    assert (sharded["devices"], sharded["shard_group"], sharded["prompts"]) == (8, 8, 2)
    config["trainer"]["strategy"] = "ddp"
    copied = planned(capsys, "--config", write_config(tmp_path / "ddp.yaml", config))
    assert (copied["devices"], copied["shard_group"]) == (8, 1)
    alone = planned(capsys, "--config", str(tmp_path / "ddp.yaml"), "--devices", "1")
    one, each, part = (found["phases"]["sampling"] for found in (alone, copied, sharded))
    assert one["base"] == each["base"]
    assert part["base"] == -(-one["base"] // 8)
    assert each["communication"] == each["gradients"]
    assert one["communication"] == 0 < part["communication"]
    assert alone["fits"]

    config["trainer"] |= {"precision": "32-true", "devices": "0,1"}
    path = write_config(tmp_path / "exact.yaml", config)
    exact = planned(capsys, "--config", path)
    assert exact["devices"] == 4  # two of each node
    assert exact["phases"]["sampling"]["base"] > 1.9 * one["base"]
    path = str(tmp_path / "run.yaml")
    run(["plan", "--config", path, "--memory", "0.0001"])
    out = capsys.readouterr().out
    assert "computed, not run" in out and "KV cache" in out
    assert "does not fit into 0.0001 GB (8 devices, weights sharded over 8)" in out


def test_gradients_are_kept_where_batches_are_accumulated(
    tiny_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def gradient(batches: int) -> dict[str, int]:
        base = tiny_folder("llama", num_hidden_layers=5)
        config = run_config(tmp_path, base, accumulate_grad_batches=batches, devices=1)
        full = {"class_path": "Mixture", "init_args": {"targets": "full"}}
        config["model"]["init_args"] |= {"conditioner": full, "gradient_checkpointing": True}
        path = write_config(tmp_path / "run.yaml", config)
        found: dict[str, dict[str, dict[str, int]]]
        found = planned(capsys, "--config", path, "--prompt_tokens", "64")
        return found["phases"]["gradient"]

    once, kept = gradient(1), gradient(2)
    assert once["gradients"] < kept["gradients"] == kept["deltas"]


def test_the_number_of_devices_must_be_known(
    tiny_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for devices in ("auto", -1, "-1"):
        config = run_config(tmp_path, tiny_folder(), devices=devices)
        path = write_config(tmp_path / "run.yaml", config)
        assert "give --devices" in refusal(capsys, "plan", "--config", path)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("devices", "0"),
        ("devices", "two"),
        ("prompt_tokens", "0"),
        ("prompt_tokens", "-3"),
        ("prompt_tokens", "513"),  # max_prompt_tokens is 512
        ("memory", "-5"),
        ("memory", "0"),
        ("memory", "nan"),
        ("memory", "inf"),
    ],
)
def test_options_out_of_range(
    option: str,
    value: str,
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_config(tmp_path / "run.yaml", run_config(tmp_path, tiny_folder(), devices=1))
    said = refusal(capsys, "plan", "--config", path, f"--{option}", value)
    assert option in said and value in said


AVERAGING = "lightning.pytorch.callbacks."
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "devices -2": ({"devices": -2}, "trainer.devices is -2"),
    "devices 0": ({"devices": 0}, "trainer.devices is 0"),
    "devices x": ({"devices": "x"}, "trainer.devices is 'x'"),
    "devices [0]": ({"devices": [0]}, r"trainer.devices is \[0\]"),
    "devices 0,1": ({"devices": "0,1"}, "trainer.devices is '0,1'"),
    "num_nodes 0": ({"num_nodes": 0}, "num_nodes"),
    "num_nodes x": ({"num_nodes": "x"}, "num_nodes"),
    "accumulation 0": ({"accumulate_grad_batches": 0}, "accumulate_grad_batches is 0"),
    "accumulation -1": ({"accumulate_grad_batches": -1}, "accumulate_grad_batches is -1"),
    "fsdp": ({"strategy": "fsdp"}, "FSDPStrategy would split.*strategy: ddp"),
    "deepspeed": ({"strategy": "deepspeed"}, "DeepSpeedStrategy would split.*strategy: ddp"),
    "nonsense": ({"strategy": "nonsense"}, "strategy='nonsense'"),
    "no name": ({"strategy": {"init_args": {}}}, "trainer.strategy"),
    "4 of 8": ({"strategy": sharded_over(4), "devices": 8}, "data_parallel_size is 4.* to 8"),
    "16 of 8": ({"strategy": sharded_over(16), "devices": 8}, "data_parallel_size is 16.* to 8"),
    "0 of 8": ({"strategy": sharded_over(0), "devices": 8}, "data_parallel_size is 0.* to 8"),
    "auto of 8": (
        {"strategy": sharded_over("auto"), "devices": 4, "num_nodes": 2},
        "data_parallel_size is auto, which is 2,.* to 8",
    ),
    "products": (
        {"strategy": sharded_over(4, 2), "devices": 8},
        "tensor_parallel_size is 2.* to 1",
    ),
    "products on one": ({"strategy": sharded_over(1, 2)}, "tensor_parallel_size is 2.* to 1"),
    "products by default": (
        {"strategy": {"class_path": "ModelParallelStrategy"}, "devices": 8},
        "tensor_parallel_size is auto, which is 8.* to 1",
    ),
    "folders of shards": (
        {"strategy": {"class_path": "ModelParallelStrategy"}},
        "save_distributed_checkpoint: false",
    ),
    "average of shards": (
        {"callbacks": [{"class_path": f"{AVERAGING}EMAWeightAveraging"}]}
        | {"strategy": sharded_over(1)},
        "EMAWeightAveraging.*ddp",
    ),
    "average of nothing": (
        {
            "callbacks": [
                {
                    "class_path": f"{AVERAGING}StochasticWeightAveraging",
                    "init_args": {"swa_lrs": 0.01},
                }
            ]
        },
        "StochasticWeightAveraging.*EMAWeightAveraging",
    ),
}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of all processes, so that none is started."""
    monkeypatch.setattr(
        "lightning.pytorch.strategies.launchers.subprocess_script._SubprocessScriptLauncher."
        "_call_children_scripts",
        lambda self: None,
    )


OFTEN = ("devices -2", "accumulation 0", "fsdp", "4 of 8", "products on one", "average of nothing")
CASES = [pytest.param(n, marks=[] if n in OFTEN else pytest.mark.slow, id=n) for n in REFUSED]


@pytest.mark.parametrize("name", CASES)
def test_what_fit_refuses_plan_refuses_in_the_same_words(
    name: str,
    alone: None,
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer, pattern = REFUSED[name]
    config = run_config(tmp_path, tiny_folder(), **({"devices": 1} | trainer))
    path = write_config(tmp_path / "run.yaml", config)
    said = refusal(capsys, "plan", "--config", path)
    assert re.search(pattern, said)
    # A command of several has its name before the keys.
    assert refusal(capsys, "fit", "--config", path).replace("fit.", "") == said


def test_what_the_modules_refuse(
    tiny_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_config(tmp_path, tiny_folder(), devices=1)
    path = tmp_path / "run.yaml"
    for option, number in (("rollout_chunks", 50), ("rollout_batches", 3)):
        arguments = config["model"]["init_args"]
        write_config(
            path,
            config | {"model": {**config["model"], "init_args": {**arguments, option: number}}},
        )
        said = refusal(capsys, "plan", "--config", str(path))
        assert f"{option}={number}" in said
        assert refusal(capsys, "fit", "--config", str(path)) == said


@pytest.mark.parametrize("text", ["a: [1", "- 1\n", "trainer: [1]\n", ""])
def test_files_that_are_no_configs(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert refusal(capsys, "plan", "--config", str(path), "--devices", "1")
