"""Two nodes do what one process does, and when one of them has died and is back both go on."""

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
    for name, killed in (("two", None), ("killed", 1), ("without a head", 0)):
        folder = tmp_path / name
        args = ["fit", "--config", config_of(folder, base, 2), "--ckpt_path=last"]
        with two_nodes() as names:
            nodes = [Node(i, node, folder / f"{i}.log", args) for i, node in enumerate(names)]
            try:
                if killed is not None:
                    wait_for(folder / "run/checkpoints/last.ckpt", nodes)
                    nodes[killed].kill()
                    if killed == 0:  # which held the rendezvous
                        assert nodes[1].end(timeout=300) != 0
                        nodes[1] = Node(1, names[1], folder / "1.log", args)
                    nodes[killed] = Node(killed, names[killed], folder / f"{killed}.log", args)
                statuses = [node.end(timeout=600) for node in nodes]
            finally:
                for node in nodes:
                    if node.process.poll() is None:
                        node.kill()
        output = "".join((folder / f"{i}.log").read_text()[-2000:] for i in range(2))
        assert statuses == [0, 0], output
        check_equal(tmp_path / "one", folder)
        log = (folder / "0.log").read_text()
        # Where a node was killed, its process has begun twice, then from a checkpoint.
        assert log.count("Initializing distributed: GLOBAL_RANK: 0") == 1 + (killed is not None)
        assert ("Restored" in log) == (killed is not None)


def wait_for(path: Path, nodes: list[Node]) -> None:
    end = time.monotonic() + 600
    while not path.exists():
        assert time.monotonic() < end and all(node.process.poll() is None for node in nodes)
        time.sleep(0.02)
