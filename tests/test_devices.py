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

# Every conditioner with activations recomputed and samples lost at once, the others without.
HARD = [
    Case(model, name, checkpoints=True, drops=True)
    for model in ("llama", "t5")
    for name in ("lora", "attention", "full", "logits", "prompt")
]
CASES = [
    *HARD,
    Case("llama", "lora", batch_size=2),
    Case("llama", "soft"),
    Case("llama", "row", checkpoints=True),
    Case("t5", "full", batch_size=2, drops=True),
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
    """Weights after the last step; gradients, first and last, a hundred times as close."""
    assert one["weights"].keys() == many["weights"].keys()
    for own, other in zip(one["gradients"], many["gradients"], strict=True):
        assert own.keys() == other.keys()
        for name, gradient in own.items():
            torch.testing.assert_close(other[name], gradient, rtol=0, atol=within / 100)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(many["weights"][name], weight, rtol=0, atol=within)
    assert max(g.abs().max() for g in one["gradients"][0].values() if g is not None) > 1e-4
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
    # At the first step what multiplies a zero has no gradient yet, at the last everything has.
    assert all(g is not None and g.abs().max() > 1e-9 for g in one["gradients"][1].values())
    # In a step that lost one or two samples of three to a prompt, siblings of the lost stay.
    assert any(one["dropped"]) == case.drops == any(0 < n < 3 for n in one["dropped"])


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
