"""All weight on one reward is ordinary finetuning (docs/method.md, section 2), in the Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clp_lightning import CLPCallback, CLPModule, Fixed, FixedAlpha, Mixture, Preference, Pretrained
from clp_lightning.conditioning import Coefficients, Conditioner, Scaled, Weights
from clp_lightning.conditioning.base import Scope
from clp_lightning.conditioning.plain import Unconditioned
from clp_lightning.pretrained import load_model
from tests.helpers import prompt_batch
from tests.modules.gradients import of_copy, optimized
from tests.runs import Capture, Perturbed, make_module, make_trainer
from tests.tiny import KINDS

FIRST = {"kind": 1.0, "short": 0.0}
ALPHA, LR = 0.3, 0.02


class InPlace(Unconditioned):
    """Ordinary finetuning: the model's own weights move, the reference's are kept beside them.

    Args:
        reference: Its folder.
    """

    def __init__(self, reference: str) -> None:
        super().__init__()
        self.reference_folder = reference

    def attach(self, model: nn.Module, names: Any, seed: int) -> None:
        super().attach(model, names, seed)
        for parameter in model.parameters():
            # Out of the mapped file: products of weights aligned otherwise round otherwise.
            parameter.data = parameter.data.clone()
        plain = load_model(Pretrained(self.reference_folder, dtype="float64"))
        self._reference = dict(plain.named_parameters())

    @contextmanager
    def open(self, scope: Scope) -> Iterator[None]:  # type: ignore[override]
        named = list(self._model.named_parameters())
        own = [parameter.data for _, parameter in named]
        for name, parameter in named:
            if scope.coefficients is None:
                parameter.data = self._reference[name].data
            # As merged weights: torch orders the sums of a product by whether a weight asks for
            # a gradient, even where none is recorded.
            parameter.requires_grad_(torch.is_grad_enabled())
        try:
            with Conditioner.open(self, scope):
                yield
        finally:
            for (_, parameter), data in zip(named, own, strict=True):
                parameter.data = data
                parameter.requires_grad_(True)


def one_step(
    folder: Path, root: Path, conditioner: Conditioner, lr: float, kind_of: type[CLPModule]
) -> Any:
    """A module after one SGD step of one batch on the first reward, and the step's loss."""
    Capture.gradients.clear()
    base = Pretrained(str(folder), dtype="float64")
    options = {"optimizer": Capture, "lr": lr, "statistics_prompts": 0, "samples_per_prompt": 8}
    module = make_module(base, kind_of, conditioner=conditioner, **options)
    callback = CLPCallback(Fixed(FIRST), FixedAlpha(ALPHA))
    trainer = make_trainer(root, callback, max_steps=1)
    batches: Any = [prompt_batch(["ab", "hello", "a longer prompt"])]
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return module, trainer.callback_metrics["train/loss"]


class Seen(Perturbed):
    """Keeps what it saw, as Perturbed does, and starts where its file says."""

    def configure_model(self) -> None:
        if not self.policy.is_built:
            CLPModule.configure_model(self)
            self.seen = []


@pytest.mark.parametrize("rule", [Weights(), Scaled()], ids=["w", "(1 - alpha) w"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_hot_is_finetuning_in_place(
    tiny_folder: Callable[..., Path], tmp_path: Path, kind: str, rule: Coefficients
) -> None:
    folder = tiny_folder(kind)
    scale = 1 - ALPHA if isinstance(rule, Scaled) else 1.0
    asked = Preference.single(list(FIRST.values()), ALPHA)

    # theta_ref + c Delta_1, written as an ordinary model.
    start = make_module(
        Pretrained(str(folder), dtype="float64"), Perturbed, conditioner=Mixture(coefficients=rule)
    )
    start.configure_model()
    plain = load_model(Pretrained(str(folder), dtype="float64"))
    plain.load_state_dict(start.policy.conditioner.fold(asked))
    plain.save_pretrained(tmp_path / "start")
    start.policy.tokenizer.save_pretrained(tmp_path / "start")
    idle = [p.detach().clone() for p in start.policy.conditioner.copies()[1]]

    both, loss = one_step(folder, tmp_path, Mixture(coefficients=rule), LR / scale**2, Perturbed)
    found = list(Capture.gradients[0])
    assert not any(grad is not None for grad in of_copy(both, found, 1))
    alone, plain_loss = one_step(tmp_path / "start", tmp_path, InPlace(str(folder)), LR, Seen)
    expected = dict(zip(map(id, optimized(alone)), Capture.gradients[0], strict=True))

    (ours, _), (theirs, _) = both.seen[0], alone.seen[0]
    assert torch.equal(ours.response_ids, theirs.response_ids)
    assert torch.equal(ours.logp, theirs.logp)
    assert torch.equal(loss, plain_loss) and loss != 0
    state = both.policy.conditioner.fold(asked)
    parameters = dict(alone.policy.model.named_parameters())
    names = [key.replace("/", ".") for key in both.policy.conditioner.deltas[0]]
    assert names == list(parameters)
    for name, gradient in zip(names, of_copy(both, found, 0), strict=True):
        wanted = expected[id(parameters[name])]
        assert wanted is not None and gradient is not None
        torch.testing.assert_close(gradient, scale * wanted, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(state[name], parameters[name].data, rtol=0, atol=1e-6)
    for parameter, before in zip(both.policy.conditioner.copies()[1], idle, strict=True):
        assert torch.equal(parameter, before)
