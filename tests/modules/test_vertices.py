"""Rewarded Soups is ``Vertices``: one run over the corners is K separate runs, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from clp_lightning import CLPCallback, Fixed, FixedAlpha, LoRA, Mixture, Pretrained, Vertices
from clp_lightning.callbacks import WeightSampler
from clp_lightning.conditioning import Conditioner
from tests.helpers import prompt_batch
from tests.runs import Perturbed, make_module, make_trainer

NAMES = ["kind", "short"]
STEPS, PER_STEP, CLIP = 8, 2, 0.05
WORDS = ["tea", "fog", "ink", "owl", "jam", "zip", "sun", "hello"]


class Norms(Callback):
    """Keeps the norm of every step's gradient, as it is before clipping."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        self.norms.append(float(torch.cat([g.flatten() for g in grads if g is not None]).norm()))


def run(
    base: Pretrained,
    folder: Path,
    conditioner: Conditioner,
    weights: WeightSampler,
    batches: Sequence[int],
) -> tuple[Perturbed, Norms, list[list[Tensor]]]:
    """A run of AdamW over the numbered batches; also its copies before the first step."""
    module = make_module(
        base, Perturbed, conditioner=conditioner, lr=0.02, weight_decay=0.1, statistics_prompts=0
    )
    module.configure_model()
    start = [[p.detach().clone() for p in copy] for copy in module.policy.conditioner.copies()]
    norms = Norms()
    trainer = make_trainer(
        folder,
        CLPCallback(weights, FixedAlpha(0.3), per="step"),
        norms,
        max_steps=len(batches) // PER_STEP,
        accumulate_grad_batches=PER_STEP,
        gradient_clip_val=CLIP,
    )
    trainer.fit(module, DataLoader([numbered(i) for i in batches], batch_size=None))  # type: ignore[arg-type]
    return module, norms, start


def numbered(index: int) -> Any:
    """The batch of this number: its rollouts are keyed by its prompts' numbers."""
    batch = prompt_batch([f"{WORDS[index % 8]} {WORDS[index // 8]}", WORDS[index % 8]])
    batch.prompt_ids += 2 * index
    return batch


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize(
    "conditioner",
    [lambda: LoRA(rank=2, shared_rank=0), lambda: Mixture(targets="full", rest="freeze")],
    ids=["lora", "full"],
)
def test_vertices_are_separate_runs(
    conditioner: Callable[[], Conditioner],
    kind: str,
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    base = Pretrained(str(tiny_folder(kind)), dtype="float64")
    batches = range(STEPS * PER_STEP)
    soup, norms, start = run(base, tmp_path, conditioner(), Vertices(), batches)
    corners = [int(rollout.preference.weights[0].argmax()) for rollout, _ in soup.seen]
    # Both corners come, and each after the other: an idle copy has moments that could drift.
    assert {(0, 1), (1, 0)} <= set(zip(corners, corners[PER_STEP:], strict=False))

    for k, name in enumerate(NAMES):
        own = [i for i in batches if corners[i] == k]
        weights = Fixed({other: float(other == name) for other in NAMES})
        alone, alone_norms, _ = run(base, tmp_path, conditioner(), weights, own)
        for i, (rollout, _) in zip(own, alone.seen, strict=True):
            assert torch.equal(rollout.response_ids, soup.seen[i][0].response_ids)
        assert alone_norms.norms == pytest.approx(
            [norms.norms[i // PER_STEP] for i in own[::PER_STEP]]
        )
        assert min(alone_norms.norms) > CLIP  # every step was clipped
        ours, theirs = soup.policy.conditioner.copies(), alone.policy.conditioner.copies()
        for p, q, before in zip(ours[k], theirs[k], start[k], strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
            assert (p - before).abs().max() > 1e-3
        for q, before in zip(theirs[1 - k], start[1 - k], strict=True):
            assert torch.equal(q, before)
