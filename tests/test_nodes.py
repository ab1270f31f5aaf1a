"""Two nodes do what one process does, and when one of them has died both go on together."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clp_lightning.cli import main
from tests.nodes import Node, can_have_namespaces, two_nodes
from tests.processes import in_child
from tests.runs import run_config, write_config
from tests.test_ddp import read_checkpoint

STEPS = 5


def config_of(folder: Path, base: Path, accumulate: int) -> str:
    config = run_config(folder, base, accumulate_grad_batches=accumulate, max_steps=STEPS)
    config["trainer"] |= {"limit_val_batches": 0, "gradient_clip_val": None}
    config["trainer"]["callbacks"][2]["init_args"]["every_n_train_steps"] = 1
    config["model"]["init_args"] |= {
        "pretrained": {"name": str(base), "dtype": "float64"},
        "optimizer": {"class_path": "torch.optim.SGD"},
    }
    return write_config(folder / "config.yaml", config)


def check_equal(one: Path, two: Path) -> None:
    weights, others = read_checkpoint(one)[0], read_checkpoint(two)[0]
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=0, atol=1e-8)
    assert any("lora_B" in name and bool(weight.any()) for name, weight in weights.items())


@pytest.mark.slow
@pytest.mark.skipif(not can_have_namespaces(), reason="needs iproute2 and the right to namespaces")
def test_two_nodes_and_the_death_of_one(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_folder()
    assert in_child(main, ["fit", "--config", config_of(tmp_path / "one", base, 4)]) == 0
    for name in ("two", "killed"):
        folder = tmp_path / name
        args = ["fit", "--config", config_of(folder, base, 2), "--ckpt_path=last"]
        with two_nodes() as names:
            nodes = start(names, folder, args)
            try:
                if name == "killed":
                    wait_for(folder / "run/checkpoints/last.ckpt", nodes)
                    nodes[1].kill()
                    assert nodes[0].end(timeout=300) != 0  # alone it ends too
                    nodes = start(names, folder, args)
                statuses = [node.end(timeout=600) for node in nodes]
            finally:
                for node in nodes:
                    if node.process.poll() is None:
                        node.kill()
        output = "".join((folder / f"{i}.log").read_text()[-2000:] for i in range(2))
        assert statuses == [0, 0], output
        check_equal(tmp_path / "one", folder)
    assert "Restor" in (folder / "0.log").read_text()  # it went on, and did not begin again


def start(names: tuple[str, str], folder: Path, args: list[str]) -> list[Node]:
    return [Node(i, name, folder / f"{i}.log", args) for i, name in enumerate(names)]


def wait_for(path: Path, nodes: list[Node]) -> None:
    end = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < end and all(node.process.poll() is None for node in nodes)
        time.sleep(0.02)
