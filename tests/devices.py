"""Training, fronts and predictions on several CPU processes; a group of them does many cases."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from clp_lightning import (
    CLPCallback,
    CLPModule,
    LoRA,
    Pretrained,
    RewardModule,
    RunCheckpoint,
    SupervisedModule,
)
from clp_lightning.callbacks import FrontCallback, PredictionsCallback
from clp_lightning.conditioning import Mixture, PromptText, SoftPrompt
from tests.reward_models import make_data as pair_data
from tests.reward_models import pairs
from tests.runs import kind, loud, make_data, make_module, make_trainer, write_rows

PER_STEP = 8  # prompts in an optimizer step, whatever the number of processes


def now_and_then(completions: list[str], **_: Any) -> list[float]:
    """A reward that fails on about every thirtieth response."""
    return [float("nan") if sum(map(ord, c)) % 31 == 0 else len(c) / 9 for c in completions]


def conditioner(name: str) -> Any:
    """Small ones of every kind."""
    if name == "lora":
        return LoRA(rank=2, shared_rank=2)
    if name == "row":
        return Mixture("attention", mixing="row")
    if name == "prompt":
        return PromptText(rest=LoRA(shared_rank=2))
    return SoftPrompt() if name == "soft" else Mixture(name)


@dataclass
class Case:
    """One training run.

    Attributes:
        model: ``llama`` or ``t5``.
        conditioned: Name of a conditioner.
        checkpoints: Whether activations are checkpointed.
        drops: Whether some samples are dropped.
        batch_size: Prompts in a batch. With 1 the third step of every pass has half as many as the
            others; with 2 a prompt is left over, which makes no batch.
        options: Further arguments of the module.
        precision: Of the Trainer.
    """

    model: str
    conditioned: str
    checkpoints: bool = False
    drops: bool = False
    batch_size: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    precision: str = "32-true"

    def __str__(self) -> str:
        parts = [self.model, self.conditioned]
        parts += [name for name in ("checkpoints", "drops") if getattr(self, name)]
        parts += ["pairs"] if self.batch_size > 1 else []
        parts += [self.precision] if self.precision != "32-true" else []
        return "-".join(parts)

    @property
    def rows(self) -> int:
        """Prompts to train on."""
        return 20 if self.batch_size == 1 else 25


class Dropped(Callback):
    """How many samples were dropped in each step, over all processes."""

    def __init__(self) -> None:
        self.numbers: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.step_report:
            self.numbers.append(pl_module.step_report.get("dropped", 0.0))
            pl_module.step_report = {}


class Watched(torch.optim.SGD):
    """Keeps the gradients of the first step and of the newest, whole, by the parameter."""

    steps: ClassVar[list[dict[Tensor, Tensor | None]]] = []

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"]]
        found = {p: None if p.grad is None else whole(p.grad).clone() for p in parameters}
        Watched.steps[1:] = [found]
        super().step()
        return loss


def whole(tensor: Tensor) -> Tensor:
    """Of a shard the tensor that it is a part of."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def strategy_of(layout: str) -> Any:
    """``one``, ``ddp`` or ``fsdp``."""
    if layout == "fsdp":
        size = int(os.environ["WORLD_SIZE"])
        return ModelParallelStrategy(size, 1, save_distributed_checkpoint=False)
    return "ddp" if layout == "ddp" else "auto"


def trainer_of(folder: Path, layout: str, *callbacks: Any, **options: Any) -> Trainer:
    """On the processes of this group."""
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    nodes = int(os.environ.get("WORLD_SIZE", "1")) // devices
    options = {"devices": devices, "num_nodes": nodes, "strategy": strategy_of(layout)} | options
    return make_trainer(folder, *callbacks, **options)


def train(case: Case, base: Path, steps: int, folder: Path, layout: str) -> dict[str, Any]:
    """Gradients of the first of ``steps`` and of the last, and weights after it, whole."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    Watched.steps = []
    options: dict[str, Any] = {
        "conditioner": conditioner(case.conditioned),
        "rewards": {"kind": kind, "other": now_and_then if case.drops else loud},
        "on_reward_error": "drop" if case.drops else "raise",
        "gradient_checkpointing": case.checkpoints,
        "optimizer": Watched,
        # Small enough that no run magnifies rounding.
        "lr": 0.005 if case.model == "llama" else 0.001,
        "samples_per_prompt": 3 if case.drops else 2,  # three: the siblings of a lost one stay
        "max_new_tokens": 4,
        "statistics_prompts": 2 if case.batch_size == 1 else 12,
    }
    spec = Pretrained(str(base), dtype="float64" if case.precision == "32-true" else "float32")
    module = make_module(spec, CLPModule, **(options | case.options))
    source = str(write_rows(folder / f"rows-{os.environ.get('RANK', '0')}.jsonl", case.rows))
    data = make_data(folder, source=source, holdout=0, batch_size=case.batch_size)
    dropped = Dropped()
    settings = {
        "accumulate_grad_batches": PER_STEP // world // case.batch_size,
        "precision": case.precision,
    }
    trainer = trainer_of(folder, layout, CLPCallback(), dropped, max_steps=steps, **settings)
    trainer.fit(module, data)
    named = dict(module.named_parameters())
    return {
        "gradients": [
            {n: step[p] for n, p in named.items() if p in step} for step in Watched.steps
        ],
        "weights": {n: whole(p) for n, p in module.policy.trained_parameters().items()},
        "dropped": dropped.numbers,
    }


def go_on(
    case: Case, base: Path, source: Path | str | None, folder: Path, layout: str
) -> list[str]:
    """Four steps of AdamW, from the beginning or ``source``, a checkpoint after every other.

    Returns:
        What was warned of.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    module, data = _small_module(case, base), make_data(folder, holdout=0, batch_size=1)
    saved = RunCheckpoint(2, dirpath=str(folder / "checkpoints"))
    settings = {"accumulate_grad_batches": 2 // world, "max_steps": 4}
    trainer = trainer_of(folder, layout, CLPCallback(), saved, **settings)
    with warnings.catch_warnings(record=True) as told:
        trainer.fit(module, data, ckpt_path=source)
    return [str(warning.message) for warning in told]


def _small_module(case: Case, base: Path) -> Any:
    return make_module(
        Pretrained(str(base), dtype="float64"),
        conditioner=conditioner(case.conditioned),
        samples_per_prompt=2,
        max_new_tokens=4,
        statistics_prompts=2,
        warmup_steps=3,
        eval_rows=4,
    )


def validate(case: Case, base: Path, source: Path, folder: Path, layout: str) -> None:
    """The front of what ``go_on`` trained, into ``front.json``."""
    module = _small_module(case, base)
    data = make_data(folder, holdout=5, batch_size=1, eval_batch_size=2)
    trainer = trainer_of(folder, layout, FrontCallback(), limit_val_batches=1.0)
    trainer.validate(module, data, ckpt_path=source)


def finetune(kind_of: str, base: Path, folder: Path, layout: str) -> dict[str, float]:
    """One pass of a ``reward`` model, or of supervised finetuning (``lora`` or ``full``).

    Returns:
        What was logged at its end.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    spec = Pretrained(str(base), dtype="float64")
    options: dict[str, Any] = {"lr": 0.01, "optimizer": torch.optim.SGD, "seed": 3}
    module: Any
    if kind_of == "reward":
        module, data = RewardModule(spec, **options), pair_data(pairs(20), holdout=4, batch_size=1)
    else:
        rank = 2 if kind_of == "lora" else 0
        module = SupervisedModule(spec, "answer", lora_rank=rank, **options)
        data = make_data(folder, batch_size=1)
    trainer = Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy_of(layout),
        default_root_dir=folder,
        logger=False,
        max_epochs=1,
        accumulate_grad_batches=4 // world,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def measure_front(base: Path, folder: Path, layout: str) -> None:
    """The front of five prompts, into ``front.json``."""
    module = make_module(base, conditioner=LoRA(rank=2), statistics_prompts=0, eval_rows=4)
    data = make_data(folder, holdout=5, batch_size=1, eval_batch_size=2)
    trainer = trainer_of(folder, layout, FrontCallback(), limit_val_batches=1.0)
    trainer.validate(module, data)


def predict(base: Path, folder: Path, layout: str) -> None:
    """Answers to 1,003 prompts, into ``predictions.jsonl``."""
    source = folder / "many.jsonl"
    if int(os.environ.get("RANK", "0")) == 0:
        lines = "".join(f'{{"prompt": "{i}"}}\n' for i in range(1003 + 4))
        source.with_suffix(".partial").write_text(lines)
        source.with_suffix(".partial").rename(source)
    while not source.exists():
        time.sleep(0.1)
    module = make_module(base, rewards={"kind": kind}, max_new_tokens=1, statistics_prompts=0)
    data = make_data(folder, source=str(source), holdout=1003, batch_size=1, eval_batch_size=64)
    trainer = trainer_of(folder, layout, PredictionsCallback(), limit_predict_batches=None)
    trainer.predict(module, data, return_predictions=False)


def uneven_generation(base: Path, folder: Path, layout: str) -> list[int]:
    """Lengths of responses where one process stops after a token and the other never does."""
    module = make_module(base, conditioner=Mixture(), max_new_tokens=64, statistics_prompts=0)
    lengths: list[int] = []

    class Uneven(CLPCallback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            super().on_train_batch_start(trainer, pl_module, *args)
            pl_module.policy.stop_ids = list(range(102)) if trainer.global_rank else []

    original = module.generate

    def generate(batch: Any) -> Any:
        rollout = original(batch)
        lengths.append(rollout.response_ids.shape[1])
        return rollout

    module.generate = generate
    trainer_of(folder, layout, Uneven(), max_steps=1).fit(module, make_data(folder, batch_size=1))
    return lengths


Job = tuple[str, Callable[..., Any], tuple[Any, ...]]
"""A name, a function and its first arguments; folder and layout are its last."""


def run_group(jobs: list[Job], folder: Path, layout: str, world: int, timeout: float) -> None:
    """Runs ``jobs`` one after the other on ``world`` processes.

    What the function returns on rank R lies in ``folder``/NAME.R.pt.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=_rank, args=(rank, world, port, jobs, folder, layout))
        for rank in range(world)
    ]
    for child in children:
        child.start()
    try:
        end = time.monotonic() + timeout
        for child in children:
            child.join(max(0.0, end - time.monotonic()))
        output = "".join(path.read_text()[-3000:] for path in sorted(folder.glob("output-*")))
        assert [child.exitcode for child in children] == [0] * world, output
    finally:
        for child in children:
            child.kill()


def _rank(rank: int, world: int, port: int, jobs: list[Job], folder: Path, layout: str) -> None:
    sys.stdout = sys.stderr = open(folder / f"output-{rank}", "w", buffering=1)  # noqa: SIM115
    if world > 1:
        os.environ |= {
            "TORCHELASTIC_RUN_ID": "test",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
        }
    run_jobs(jobs, folder, layout)


def run_jobs(jobs: list[Job], folder: Path, layout: str) -> None:
    """Runs ``jobs`` in this process, which is one of its group; see ``run_group``."""
    rank = os.environ.get("RANK", "0")
    try:
        for name, function, arguments in jobs:
            place = folder / name
            place.mkdir(exist_ok=True)
            found = function(*arguments, place, layout)
            torch.save(found, folder / f"{name}.{rank}.pt")
    except BaseException:
        traceback.print_exc()
        raise
