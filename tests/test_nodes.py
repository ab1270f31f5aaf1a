"""Two nodes do what one process does, and when one of them has died and is back both go on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clp_lightning.cli import main
from tests.devices import Case, Job, run_group, train
from tests.nodes import Node, can_have_namespaces, fit_command, jobs_command, two_nodes
from tests.processes import in_child
from tests.runs import run_config, write_config
from tests.test_devices import check_equal, load
from tests.test_resume import same

STEPS = 10
# LoRA on Llama is what the run does that loses a node.
CASES = [
    Case("llama", "full", checkpoints=True, drops=True),
    Case("t5", "lora", checkpoints=True, drops=True),
    Case("t5", "attention", drops=True, batch_size=2),
    Case("llama", "logits", drops=True),
    Case("t5", "prompt", checkpoints=True, drops=True),
]
needs_namespaces = pytest.mark.skipif(
    not can_have_namespaces(), reason="needs iproute2 and the right to namespaces"
)


def config_of(folder: Path, base: Path, accumulate: int) -> str:
    config = run_config(folder, base, accumulate_grad_batches=accumulate, max_steps=STEPS)
    config["trainer"] |= {"limit_val_batches": 0, "gradient_clip_val": None}
    config["trainer"]["callbacks"][2]["init_args"]["every_n_train_steps"] = 1
    config["model"]["init_args"]["pretrained"] = {"name": str(base), "dtype": "float64"}
    return write_config(folder / "config.yaml", config)


def read(folder: Path) -> dict[str, Any]:
    path = folder / "run/checkpoints/last.ckpt"
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def outputs(folder: Path) -> str:
    return "".join((folder / f"{i}.log").read_text()[-2000:] for i in range(2))


@pytest.mark.slow
@needs_namespaces
def test_two_nodes_and_the_death_of_one(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_folder()
    assert in_child(main, ["fit", "--config", config_of(tmp_path / "one", base, 4)]) == 0
    for name, killed in (("two", None), ("killed", 1), ("without a head", 0)):
        folder = tmp_path / name
        fit = fit_command(["fit", "--config", config_of(folder, base, 2), "--ckpt_path=last"])
        with two_nodes() as names:
            nodes = [Node(i, node, folder / f"{i}.log", fit) for i, node in enumerate(names)]
            try:
                if killed is not None:
                    wait_for(folder / "run/checkpoints/last.ckpt", nodes)
                    nodes[killed].kill()
                    if killed == 0:  # which held the rendezvous
                        assert nodes[1].end(timeout=300) != 0
                        nodes[1] = Node(1, names[1], folder / "1.log", fit)
                    nodes[killed] = Node(killed, names[killed], folder / f"{killed}.log", fit)
                statuses = [node.end(timeout=900) for node in nodes]
            finally:
                end_all(nodes)
        assert statuses == [0, 0], outputs(folder)
        found, one, two = (read(path) for path in (folder, tmp_path / "one", tmp_path / "two"))
        for weight, expected in one["state_dict"].items():
            torch.testing.assert_close(found["state_dict"][weight], expected, rtol=0, atol=1e-8)
        # With the optimizer's moments and to the last bit what the nodes do that nothing befalls.
        for key in ("state_dict", "optimizer_states", "global_step"):
            assert same(found[key], two[key]), key
        log = (folder / "0.log").read_text()
        # Where a node was killed, its process has begun twice, then from a checkpoint.
        assert log.count("Initializing distributed: GLOBAL_RANK: 0") == 1 + (killed is not None)
        assert ("Restored" in log) == (killed is not None)
    moved = [name for name, weight in two["state_dict"].items() if bool(weight.any())]
    assert any("lora_B" in name for name in moved)


@pytest.mark.slow
@needs_namespaces
def test_two_nodes_do_what_one_process_does(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    jobs: list[Job] = [(str(case), train, (case, tiny_folder(case.model), STEPS)) for case in CASES]
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    run_group(jobs, one, "one", 1, timeout=900)
    command = jobs_command(jobs, two)
    with two_nodes() as names:
        nodes = [Node(i, node, two / f"{i}.log", command) for i, node in enumerate(names)]
        try:
            statuses = [node.end(timeout=900) for node in nodes]
        finally:
            end_all(nodes)
    assert statuses == [0, 0], outputs(two)
    for case in CASES:
        check_equal(load(one, str(case)), load(two, str(case)))


def end_all(nodes: list[Node]) -> None:
    for node in nodes:
        if node.process.poll() is None:
            node.kill()


def wait_for(path: Path, nodes: list[Node]) -> None:
    end = time.monotonic() + 600
    while not path.exists():
        assert time.monotonic() < end and all(node.process.poll() is None for node in nodes)
        time.sleep(0.02)
