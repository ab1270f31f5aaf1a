"""The gradient of every step of a run, and the same by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clp_lightning import CLPCallback, FixedAlpha, Pretrained
from clp_lightning.rewards import Scores
from clp_lightning.types import Rollout
from tests.runs import Capture, Perturbed, make_data, make_module, make_trainer

Gradients = list[Tensor | None]


def gradients(
    base: Pretrained,
    folder: Path,
    callback: CLPCallback | None = None,
    *,
    data: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Perturbed, list[Gradients]]:
    """The module and the gradient of every step of a run; by default its weights stand still."""
    Capture.gradients.clear()
    Capture.rates.clear()
    module: Perturbed = make_module(
        base, **({"kind_of": Perturbed, "optimizer": Capture, "lr": 0.0} | options)
    )
    callback = callback or CLPCallback(alpha=FixedAlpha(0.3))
    arguments = {"max_epochs": 1, "max_steps": -1} | (trainer or {})
    runner = make_trainer(folder, callback, **arguments)
    runner.fit(module, make_data(folder, **(data or {})))
    return module, list(Capture.gradients)


def assert_same(found: Gradients, expected: Gradients) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a is not None and b is not None
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        assert a.abs().max() > 0


def mean(several: list[Gradients]) -> Gradients:
    return [torch.stack(list(column)).mean(0) for column in zip(*several, strict=True)]  # type: ignore[arg-type]


def by_hand(module: Perturbed, rollout: Rollout, scores: Scores) -> Tensor:
    """The loss of docs/method.md, section 3, response by response and token by token."""
    with module.policy.conditioned(rollout.preference):
        logp = module.policy.logprobs(rollout)
    with module.policy.reference():
        ratio = logp.detach() - module.policy.logprobs(rollout)
    rewards = module.rewards.normalize(scores.raw).double()
    given = rollout.preference
    # The objective's coefficients are single precision, as the preferences are.
    gains, alphas = ((1 - given.alpha[:, None]) * given.weights).double(), given.alpha.double()
    loss = torch.zeros((), dtype=torch.float64)
    for b in range(len(rollout)):
        siblings = [
            s for s in range(len(rollout)) if rollout.groups[s] == rollout.groups[b] and s != b
        ]
        if not siblings:
            continue
        alpha = alphas[b]
        others = sum(rewards[s] for s in siblings) / len(siblings)
        gain = (gains[b] * (rewards[b] - others)).sum()

        def kl(row: int, t: int) -> Tensor:
            start = {"response": 0, "to_go": t}[module.kl]
            return ratio[row, start:][rollout.response_mask[row, start:]].sum()

        for t in range(int(rollout.lengths[b])):
            others_kl = sum(kl(s, t) for s in siblings) / len(siblings)
            loss = loss - (gain - alpha * (kl(b, t) - others_kl)) * logp[b, t]
    return loss / len(rollout)


def optimized(module: Perturbed) -> list[torch.nn.Parameter]:
    """The optimizer's parameters, in its order."""
    groups = module.optimizers().param_groups  # type: ignore[union-attr]
    return [parameter for group in groups for parameter in group["params"]]


def gradient_by_hand(module: Perturbed, number: int) -> Gradients:
    """Of the ``number``-th batch, whose weights the module must still have."""
    loss = by_hand(module, *module.seen[number])
    return list(torch.autograd.grad(loss, optimized(module)))


def of_copy(module: Perturbed, grads: Gradients, index: int) -> Gradients:
    """The gradients of one reward's copy."""
    by_id = {id(p): grad for p, grad in zip(optimized(module), grads, strict=True)}
    return [by_id[id(parameter)] for parameter in module.policy.conditioner.copies()[index]]


def norm(grads: Gradients) -> float:
    return float(torch.cat([g.flatten() for g in grads if g is not None]).norm())
