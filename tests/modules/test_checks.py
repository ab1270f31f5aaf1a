"""What a Trainer may not ask of the modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from clp_lightning import RewardModule, SupervisedModule
from clp_lightning.modules.checks import check_trainer
from clp_lightning.modules.sharding import check_strategy
from tests.runs import make_module, make_trainer

KINDS = {
    "clp": lambda: make_module("nowhere"),
    "supervised": lambda: SupervisedModule("nowhere"),
    "reward": lambda: RewardModule("nowhere"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [0, -1])
def test_accumulation_of_nothing(kind: str, number: int, tmp_path: Path) -> None:
    trainer: Any = make_trainer(tmp_path, accumulate_grad_batches=number)
    with pytest.raises(ValueError, match=f"accumulate_grad_batches is {number}; .* at least 1"):
        trainer.fit(KINDS[kind](), [])


def test_other_ways_to_shard() -> None:
    with pytest.raises(ValueError, match="FSDPStrategy would split.*strategy: ddp"):
        check_strategy(FSDPStrategy)


def refusal(folder: Path, *callbacks: Callback, strategy: Any) -> str | None:
    """What is said of callbacks under a strategy."""
    module = make_module("nowhere")
    module.trainer = make_trainer(folder, *callbacks, strategy=strategy, devices=1)
    try:
        check_trainer(module)
    except ValueError as error:
        return str(error)
    return None


def test_averages(tmp_path: Path) -> None:
    averages = [EMAWeightAveraging(), WeightAveraging()]
    for average in averages:
        sharded = ModelParallelStrategy(1, 1, save_distributed_checkpoint=False)
        said = refusal(tmp_path, average, strategy=sharded)
        assert said is not None and said.startswith(f"{type(average).__name__} copies")
        assert "strategy: ddp" in said
        assert refusal(tmp_path, average, strategy="ddp") is None
    for strategy in ("auto", "ddp"):
        said = refusal(tmp_path, StochasticWeightAveraging(0.1), strategy=strategy)
        assert said is not None and "average nothing" in said
