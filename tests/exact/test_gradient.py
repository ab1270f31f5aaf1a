"""The gradient that training steps along is the gradient of V.

The exact one is enumerated over all responses (``test_evaluate.py`` checks it). The other is what a
real Trainer leaves in ``.grad`` after a real ``CLPModule`` has sampled, scored, baselined,
accumulated and rescaled; its mean over many steps must be the exact one in every direction. Wrong
ways to do it, each of them common, are seen to fail the same check.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from clp_lightning import (
    CLPCallback,
    CLPModule,
    ExactDataModule,
    ExactReward,
    ExactTask,
    Fixed,
    FixedAlpha,
    LoRA,
    PromptBatch,
    Rollout,
)
from clp_lightning.exact import exact_gradient, exact_logp, exact_reference_logp
from clp_lightning.functional import k3, scalarize
from clp_lightning.rewards import Scores
from clp_lightning.types import Preference

WEIGHTS, ALPHA = {"first": 0.3, "second": 0.7}, 0.3
SAMPLES_PER_PROMPT = 8
COPIES = 16
PASSES = 47  # each of 8 contexts x 16 copies x 8 samples: 48,128 responses
PASSES_OF_WRONG = 25  # enough to see them
DIRECTIONS = 16
PERTURBATION = {False: 0.06, True: 0.075}  # of every trained number: a KL of about 0.5


class OwnSampleMean(CLPModule):
    def advantage(self, signals: Tensor, rollout: Rollout) -> Tensor:
        centred = signals - group_mean(signals)
        return scalarize(centred, preference=rollout.preference)


class K3InReturn(CLPModule):
    def signals(self, scores: Scores, ratio: Tensor, rollout: Rollout) -> Tensor:
        return super().signals(scores, k3(ratio), rollout)


class DividedByDeviation(CLPModule):
    def advantage(self, signals: Tensor, rollout: Rollout) -> Tensor:
        total = scalarize(signals, preference=rollout.preference)[:, :1]  # of whole responses
        deviation = group_mean((total - group_mean(total)).square()).sqrt()
        return super().advantage(signals, rollout) / deviation


class TokenMean(CLPModule):
    """Each response counts by its mean, not its sum; the mean length takes the scale out."""

    def loss(
        self, logp: Tensor, advantage: Tensor, rollout: Rollout, *, num_responses: float
    ) -> Tensor:
        lengths = rollout.lengths.to(logp)
        advantage = advantage * (lengths.mean() / lengths).unsqueeze(-1)
        return super().loss(logp, advantage, rollout, num_responses=num_responses)


class CutSampler(CLPModule):
    def generate(self, batch: PromptBatch) -> Rollout:
        cut = replace(self.sampling, top_k=3)
        return self.engine.generate(self.policy, batch, self.samples_per_prompt, cut)


def group_mean(values: Tensor) -> Tensor:
    """Mean over the responses to a prompt, for each of them."""
    grouped = values.unflatten(0, (-1, SAMPLES_PER_PROMPT))
    return grouped.mean(1, keepdim=True).expand_as(grouped).flatten(0, 1)


class Projections(Callback):
    """What every optimizer step sees of V's gradient, along each direction."""

    def __init__(self, directions: Tensor) -> None:
        self.directions = directions
        self.seen: list[Tensor] = []

    # The gradients stay until the next step's; by now they are scaled.
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        assert isinstance(pl_module, CLPModule)
        self.seen.append(-self.directions @ flat(p.grad for p in pl_module.own_parameters()))


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors])


@dataclass
class Comparison:
    """Sampled against exact gradient, along the exact one and then the random directions.

    Attributes:
        length: Of the exact gradient.
        error: Sampled less exact, in units of the length, shape (17,).
        standard_error: Of that, shape (17,).
    """

    length: float
    error: Tensor
    standard_error: Tensor

    @property
    def precise(self) -> bool:
        return bool((self.standard_error < 0.02).all())

    @property
    def agrees(self) -> bool:
        return bool((self.error.abs() < 3 * self.standard_error).all())


def compare(
    kind: type[CLPModule], task: ExactTask, folder: Path, root: Path, passes: int
) -> Comparison:
    rewards = {name: ExactReward(task, i) for i, name in enumerate(WEIGHTS)}
    module = kind(
        str(folder),
        LoRA(),
        rewards,  # type: ignore[arg-type]
        samples_per_prompt=SAMPLES_PER_PROMPT,
        max_new_tokens=task.length,
        statistics_prompts=0,
        lr=0.0,
        optimizer=torch.optim.SGD,
        seed=0,
    )
    module.configure_model()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.own_parameters():
            parameter += PERTURBATION[task.stop] * torch.randn(parameter.shape, generator=draw)

    preference = Preference.single(list(WEIGHTS.values()), ALPHA)
    logp, ref_logp = (
        exact_logp(module.policy, task, preference)[0],
        exact_reference_logp(module.policy, task),
    )
    kl = (logp.exp() * (logp - ref_logp)).sum(-1).mean().item()
    assert 0.3 < kl < 0.8, kl  # at step 0 the KL's part of the gradient could not be seen

    exact = flat(exact_gradient(module.policy, task, preference).values())
    directions = torch.randn(DIRECTIONS, len(exact), generator=draw, dtype=torch.float64)
    directions = torch.cat([exact[None], directions])
    directions /= directions.norm(dim=-1, keepdim=True)
    projections = Projections(directions)
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=root,
        # One step is one pass, which holds every context as often.
        max_epochs=passes,
        accumulate_grad_batches=2,
        callbacks=[CLPCallback(Fixed(WEIGHTS), FixedAlpha(ALPHA)), projections],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batch_size = COPIES * task.num_contexts // 2
    trainer.fit(module, ExactDataModule(task, str(folder), COPIES, batch_size, seed=0))
    seen = torch.stack(projections.seen)
    assert len(seen) == passes
    length = exact.norm()
    return Comparison(
        length.item(),
        (seen.mean(0) - directions @ exact) / length,
        seen.std(0) / passes**0.5 / length,
    )


@pytest.mark.parametrize("stop", [False, True], ids=["fixed", "stop"])
def test_gradient_is_that_of_the_objective(
    stop: bool, base_folder: Callable[[ExactTask], Path], tmp_path: Path
) -> None:
    task = ExactTask(stop=stop)
    # Whatever the model's own file says about sampling: only its stop ids count.
    folder = shutil.copytree(base_folder(task), tmp_path / "base")
    path = folder / "generation_config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**config, "do_sample": True, "top_k": 3}))
    comparison = compare(CLPModule, task, folder, tmp_path, PASSES)
    assert comparison.precise, comparison
    assert comparison.agrees, comparison


@pytest.mark.parametrize(
    ("kind", "stop"),
    [
        (OwnSampleMean, False),
        (K3InReturn, False),
        (DividedByDeviation, False),
        (CutSampler, False),
        (TokenMean, True),
    ],
)
def test_wrong_gradients_are_seen(
    kind: type[CLPModule],
    stop: bool,
    base_folder: Callable[[ExactTask], Path],
    tmp_path: Path,
) -> None:
    task = ExactTask(stop=stop)
    comparison = compare(kind, task, base_folder(task), tmp_path, PASSES_OF_WRONG)
    assert comparison.precise, comparison
    assert not comparison.agrees, comparison
