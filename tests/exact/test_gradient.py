"""The gradient that training steps along is the gradient of V.

The exact one is enumerated over all responses (``test_evaluate.py`` checks it). The other is what a
real Trainer leaves in ``.grad`` after a real ``CLPModule`` has sampled, scored, baselined,
accumulated and rescaled; its mean over many steps must be the exact one in every direction. Wrong
ways to do it, each of them common, are seen to fail the same check.
"""

from __future__ import annotations

import itertools
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
    Conditioner,
    Critic,
    ExactDataModule,
    ExactPromptText,
    ExactReward,
    ExactTask,
    Fixed,
    FixedAlpha,
    Gate,
    LoRA,
    Mixture,
    PromptBatch,
    Rollout,
    SoftPrompt,
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
DIRECTIONS, TURNED = 16, 8


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


class WithoutOwnKL(CLPModule):
    """Of the KL over the vocabulary, only what the later tokens have."""

    def further_losses(
        self, kl: Tensor, signals: Tensor, rollout: Rollout, *, num_responses: float
    ) -> Tensor:
        return super().further_losses(kl.detach(), signals, rollout, num_responses=num_responses)


class Projections(Callback):
    """What every optimizer step with a response sees of V's gradient, along each direction."""

    def __init__(self, directions: Tensor) -> None:
        self.directions = directions
        self.seen: list[Tensor] = []

    # The gradients stay until the next step's; by now they are scaled.
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        assert isinstance(pl_module, CLPModule)
        if all(p.grad is None for p in pl_module.policy.trained_parameters().values()):
            return  # every response was dropped
        self.seen.append(-self.directions @ flat(gradients(pl_module)))


def gradients(module: CLPModule) -> list[Tensor]:
    """Of the policy's trained parameters; zero where a copy was idle."""
    trained = module.policy.trained_parameters().values()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors])


@dataclass
class Comparison:
    """Sampled against exact gradient, along the exact one and then the random directions.

    Attributes:
        length: Of the exact gradient.
        error: Sampled less exact, in units of the length, shape (25,).
        standard_error: Of that, shape (25,).
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


def perturb(
    module: CLPModule, task: ExactTask, preference: Preference, draw: torch.Generator
) -> None:
    """Moves the trained weights until the KL is about 0.5: at 0 its part could not be seen."""
    trained = module.policy.trained_parameters().values()
    ref_logp = exact_reference_logp(module.policy, task)
    steps = [0.01 * torch.randn(parameter.shape, generator=draw) for parameter in trained]
    for _ in range(100):
        logp = exact_logp(module.policy, task, preference)[0]
        kl = float((logp.exp() * (logp - ref_logp)).sum(-1).mean())
        if kl > 0.4:
            break
        with torch.no_grad():
            for parameter, step in zip(trained, steps, strict=True):
                parameter += step
    starts_at_2 = module.policy.conditioner.rewrites  # where the text alone changes the policy
    assert 0.3 < kl < (2.5 if starts_at_2 else 0.8), kl


def compare(
    kind: Callable[..., CLPModule],
    task: ExactTask,
    folder: Path,
    root: Path,
    passes: int,
    conditioner: Conditioner | None = None,
    counted: tuple[float, float] = (1.0, 1.0),
    **options: Any,
) -> Comparison:
    """``counted``: what of each reward's part in the gradient is expected."""
    rewards = {name: ExactReward(task, i) for i, name in enumerate(WEIGHTS)}
    module = kind(
        str(folder),
        conditioner or LoRA(),
        rewards,  # type: ignore[arg-type]
        samples_per_prompt=SAMPLES_PER_PROMPT,
        max_new_tokens=task.length,
        statistics_prompts=0,
        lr=0.0,
        optimizer=torch.optim.SGD,
        seed=0,
        **options,
    )
    module.configure_model()
    draw = torch.Generator().manual_seed(0)
    preference = Preference.single(list(WEIGHTS.values()), ALPHA)
    perturb(module, task, preference, draw)

    expected = task.rewards * torch.tensor(counted)
    parts = list(exact_gradient(module.policy, task, preference, expected).values())
    exact = flat(parts)
    # Some are the exact one with whole tensors turned round: a tensor that is wrong stands out.
    signs = torch.randint(2, (TURNED, len(parts)), generator=draw) * 2.0 - 1
    turned = [flat(s * part for s, part in zip(row, parts, strict=True)) for row in signs]
    anywhere = torch.randn(DIRECTIONS, len(exact), generator=draw, dtype=torch.float64)
    directions = torch.cat([exact[None], torch.stack(turned), anywhere])
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
    assert len(seen) == passes or module.rewards.dropped
    length = exact.norm()
    return Comparison(
        length.item(),
        (seen.mean(0) - directions @ exact) / length,
        seen.std(0) / len(seen) ** 0.5 / length,
    )


CONDITIONERS: dict[str, Callable[[ExactTask], Conditioner]] = {
    "lora": lambda task: LoRA(),
    "full": lambda task: Mixture(),
    "full-rows": lambda task: Mixture(mixing="row"),
    "attention": lambda task: Mixture("attention"),
    "attention-frozen": lambda task: Mixture("attention", rest="freeze"),
    "logits": lambda task: Mixture("logits"),
    "gate": lambda task: LoRA(coefficients=Gate()),
    "soft-prompt": lambda task: SoftPrompt(),
    "prompt": lambda task: ExactPromptText(task),
}
EVERYTHING = list(
    itertools.product(CONDITIONERS, ["response", "to_go", "vocabulary"], *[(False, True)] * 2)
)


def pairwise(cases: list[tuple[Any, ...]]) -> set[tuple[Any, ...]]:
    """Some of ``cases`` among which every pair of two of their values stands together."""

    def pairs(case: tuple[Any, ...]) -> set[Any]:
        return set(itertools.combinations(enumerate(case), 2))

    chosen: set[tuple[Any, ...]] = set()
    missing = set().union(*map(pairs, cases))
    while missing:
        best = max(cases, key=lambda case: len(pairs(case) & missing))
        chosen.add(best)
        missing -= pairs(best)
    return chosen


def check(
    case: tuple[str, str, bool, bool], base_folder: Callable[[ExactTask], Path], root: Path, n: int
) -> Comparison:
    conditioner, kl, critic, stop = case
    task = ExactTask(stop=stop)
    options = {"kl": kl, "critic": Critic() if critic else None}
    built = CONDITIONERS[conditioner](task)
    return compare(CLPModule, task, base_folder(task), root, n, built, **options)


@pytest.mark.parametrize("case", sorted(pairwise(EVERYTHING)), ids=str)
def test_pairs_of_conditioner_baseline_and_kl(
    case: Any, base_folder: Callable[[ExactTask], Path], tmp_path: Path
) -> None:
    comparison = check(case, base_folder, tmp_path, PASSES // 4)
    assert (comparison.standard_error < 0.05).all(), comparison
    # A standard error from so few passes is itself uncertain.
    assert (comparison.error.abs() < 5 * comparison.standard_error).all(), comparison


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERYTHING, ids=str)
def test_every_conditioner_baseline_and_kl(
    case: Any, base_folder: Callable[[ExactTask], Path], tmp_path: Path
) -> None:
    comparison = check(case, base_folder, tmp_path, PASSES // 2)
    assert (comparison.standard_error < 0.035).all(), comparison
    assert (comparison.error.abs() < 4 * comparison.standard_error).all(), comparison


@pytest.mark.parametrize(
    ("stop", "kl"),
    [
        pytest.param(False, "response", marks=pytest.mark.slow),
        (True, "response"),
        (True, "to_go"),
        pytest.param(True, "vocabulary", marks=pytest.mark.slow),
    ],
)
def test_gradient_is_that_of_the_objective(
    stop: bool, kl: str, base_folder: Callable[[ExactTask], Path], tmp_path: Path
) -> None:
    task = ExactTask(stop=stop)
    # Whatever the model's own file says about sampling: only its stop ids count.
    folder = shutil.copytree(base_folder(task), tmp_path / "base")
    path = folder / "generation_config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**config, "do_sample": True, "top_k": 3}))
    comparison = compare(CLPModule, task, folder, tmp_path, PASSES, kl=kl)
    assert comparison.precise, comparison
    assert comparison.agrees, comparison


@pytest.mark.parametrize(
    ("kind", "stop"),
    [
        pytest.param(OwnSampleMean, False, marks=pytest.mark.slow),
        (K3InReturn, False),
        pytest.param(DividedByDeviation, False, marks=pytest.mark.slow),
        pytest.param(CutSampler, False, marks=pytest.mark.slow),
        (TokenMean, True),
        (WithoutOwnKL, True),
    ],
)
def test_wrong_gradients_are_seen(
    kind: type[CLPModule],
    stop: bool,
    base_folder: Callable[[ExactTask], Path],
    tmp_path: Path,
) -> None:
    task = ExactTask(stop=stop)
    kl = "vocabulary" if kind is WithoutOwnKL else "response"
    comparison = compare(kind, task, base_folder(task), tmp_path, PASSES_OF_WRONG, kl=kl)
    assert comparison.precise, comparison
    assert not comparison.agrees, comparison
