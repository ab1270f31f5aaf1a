"""Several processes, with copies of the weights or shards, do what one does."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.devices import (
    Case,
    Job,
    measure_front,
    predict,
    run_group,
    train,
    uneven_generation,
)
from tests.runs import read_lines

CHECKPOINTED = {"gradient_checkpointing": True}
CASES = [
    Case("llama", "lora"),
    Case("llama", "attention", options=CHECKPOINTED),
    Case("llama", "full", drops=True),
    Case("llama", "logits"),
    Case("llama", "prompt", options=CHECKPOINTED),
    Case("llama", "soft"),
    Case("llama", "row"),
    Case("t5", "lora", drops=True),
    Case("t5", "attention"),
    Case("t5", "full", options=CHECKPOINTED),
    Case("t5", "logits", drops=True),
    Case("t5", "prompt"),
]
# What each group of processes does beside the cases; starting one takes longer than most of it.
GROUPS = {
    ("one", 1): [measure_front],
    ("ddp", 2): [measure_front],
    ("ddp", 3): [measure_front],
    ("ddp", 4): [predict],
    ("fsdp", 2): [measure_front, uneven_generation],
}
Group = Callable[[str, int], Path]


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[..., Path]) -> Group:
    """The folder in which a group of processes has done all its jobs."""
    bases = {kind: tiny_folder(kind) for kind in ("llama", "t5")}

    @cache
    def run(layout: str, world: int) -> Path:
        folder = tmp_path_factory.mktemp(f"{layout}-{world}")
        further = GROUPS[layout, world]
        jobs: list[Job] = [(f.__name__, f, (bases["llama"],)) for f in further]
        if world != 3:
            jobs += [(str(case), train, (case, bases[case.model], 10)) for case in CASES]
        run_group(jobs, folder, layout, world, timeout=1800)
        return folder

    return run


def check_equal(one: dict[str, Any], many: dict[str, Any], *, within: float = 1e-8) -> None:
    """Weights after the last step, and gradients of the first, a hundred times as close."""
    assert one["weights"].keys() == many["weights"].keys()
    for own, other in zip(one["gradients"], many["gradients"], strict=True):
        torch.testing.assert_close(other, own, rtol=0, atol=within / 100)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(many["weights"][name], weight, rtol=0, atol=within)
    moved = [grad.abs().max() for grad in one["gradients"] if grad is not None]
    assert max(moved) > 1e-4
    assert one["dropped"] == many["dropped"]


def load(folder: Path, name: str, rank: int = 0) -> Any:
    return torch.load(folder / f"{name}.{rank}.pt", weights_only=False)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("layout", "world"), [("ddp", 2), ("ddp", 4), ("fsdp", 2)])
def test_the_same_gradients_and_weights(layout: str, world: int, case: Case, group: Group) -> None:
    # Every batch has a preference of its own where the conditioner merges, so devices that share
    # one set of weights merge different mixtures of it.
    one, many = load(group("one", 1), str(case)), load(group(layout, world), str(case))
    check_equal(one, many)
    assert bool(one["dropped"]) == case.drops


@pytest.mark.slow
def test_the_same_front(group: Group) -> None:
    one, two, three, shards = (
        (group(*which) / "measure_front/front.json").read_text()
        for which in (("one", 1), ("ddp", 2), ("ddp", 3), ("fsdp", 2))
    )
    assert one == two == three
    for own, other in zip(json.loads(one)["points"], json.loads(shards)["points"], strict=True):
        assert other["rewards"] == own["rewards"]
        assert other["value"] == pytest.approx(own["value"], abs=1e-6)  # in float32


@pytest.mark.slow
def test_predict_writes_every_prompt_once_and_in_order(group: Group) -> None:
    records = read_lines(group("ddp", 4) / "predict/predictions.jsonl")
    order = [record["prompt_id"] for record in records]
    assert len(order) == 1003 and order == sorted(set(order))


@pytest.mark.slow
def test_devices_that_share_weights_stop_together(group: Group) -> None:
    assert load(group("fsdp", 2), "uneven_generation", 0) == [64]
    assert load(group("fsdp", 2), "uneven_generation", 1) == [1]


def test_shards_do_what_one_process_does(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_folder("llama")
    half = Case("llama", "lora", precision="bf16-true")
    cases = [Case("llama", "lora"), Case("llama", "full"), half]
    jobs: list[Job] = [(str(case), train, (case, base, 2)) for case in cases]
    for layout, world in (("one", 1), ("fsdp", 2)):
        (tmp_path / layout).mkdir()
        run_group(jobs, tmp_path / layout, layout, world, timeout=240)
    for case in cases:
        one, many = (load(tmp_path / layout, str(case)) for layout in ("one", "fsdp"))
        check_equal(one, many, within=1e-4 if case is half else 1e-8)
