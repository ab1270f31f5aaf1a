"""The critic: a baseline that knows the prompt and the preference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from clp_lightning import CLPCallback, Critic, FixedAlpha, Preference, Pretrained, RunCheckpoint
from tests.helpers import prompt_batch
from tests.modules.gradients import gradients
from tests.runs import make_data, make_module, make_trainer


def test_loss_by_hand() -> None:
    predicted = torch.tensor([[1.0, 5.0, 2.0], [0.0, 0.0, 0.0]])
    signals = torch.tensor([[3.0, float("nan"), 1.0], [1.0, 1.0, 0.0]])
    # (4 + 1 + 1 + 1) / 2 over 4 responses; what was not scored teaches nothing.
    assert Critic.loss(predicted, signals, num_responses=4) == pytest.approx(7 / 8)


def test_a_negative_learning_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="lr must be 0 or more; got -1"):
        Critic(lr=-1)


def test_it_learns_what_depends_on_state_and_preference() -> None:
    critic = Critic(hidden=32)
    critic.build(width=4, num_rewards=2, seed=0)
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(512, 4, generator=draw)
    weights = torch.rand(512, 1, generator=draw)
    preference = Preference(torch.cat([weights, 1 - weights], 1), torch.rand(512, generator=draw))
    assert not critic(states, preference).any()  # as no baseline at the start

    unit = torch.nn.functional.layer_norm(states, (4,))
    target = torch.stack([unit[:, 0], weights[:, 0], preference.alpha], dim=1)
    optimizer = torch.optim.Adam(critic.parameters(), lr=critic.lr)
    for _ in range(500):
        optimizer.zero_grad()
        Critic.loss(critic(states, preference), target, num_responses=512).backward()
        optimizer.step()
    error = (critic(states, preference) - target).square().mean(0)
    assert (error < 0.05 * target.var(0)).all(), error


def test_the_state_is_the_references_and_once_for_a_prompt(base: Pretrained) -> None:
    module = make_module(base, critic=Critic())
    module.configure_model()
    batch = prompt_batch(["ab", "cde"])
    batch.preference = Preference(torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([0.1, 0.5]))
    rollout = module.engine.generate(module.policy, batch, 2, module.sampling)
    states = module.policy.prompt_states(rollout)
    assert torch.equal(states[0], states[1]) and not torch.equal(states[1], states[2])
    with torch.no_grad():
        for parameter in module.policy.trained_parameters().values():
            parameter += 0.1
    assert torch.equal(module.policy.prompt_states(rollout), states)

    output = module.policy.model.get_output_embeddings()
    with module.policy.reference():
        first: Tensor = module.policy.log_distributions(rollout)[:, 0]
    logits = output.base_layer(states) if hasattr(output, "base_layer") else output(states)
    torch.testing.assert_close(logits.log_softmax(-1), first)


def test_one_response_a_prompt_and_a_resumed_run(base: Pretrained, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="critic=Critic()"):
        make_module(base, samples_per_prompt=1)

    def fit(folder: Path, steps: int, ckpt: str | None = None) -> dict[str, Tensor]:
        module = make_module(base, samples_per_prompt=1, critic=Critic(), lr=1e-2)
        trainer = make_trainer(
            folder,
            CLPCallback(alpha=FixedAlpha(0.3)),
            RunCheckpoint(every_n_train_steps=1),
            max_steps=steps,
        )
        trainer.fit(module, make_data(tmp_path), ckpt_path=ckpt)
        return {name: p.detach().clone() for name, p in module.critic.named_parameters()}

    whole = fit(tmp_path / "whole", 4)
    fit(tmp_path / "cut", 2)
    path = next((tmp_path / "cut").rglob("last.ckpt"))
    resumed = fit(tmp_path / "cut", 4, str(path))
    for name, value in whole.items():
        assert torch.equal(value, resumed[name])
    assert whole["body.2.weight"].any()


def test_its_gradient_is_not_the_policys(base: Pretrained, tmp_path: Path) -> None:
    """The policy's gradient is that of a fixed baseline: here 0, where the critic starts."""
    module, found = gradients(base, tmp_path, critic=Critic(), statistics_prompts=0)
    rollout, scores = module.seen[0]
    with module.policy.conditioned(rollout.preference):
        logp = module.policy.logprobs(rollout)
    with module.policy.reference():
        ratio = logp.detach() - module.policy.logprobs(rollout)
    kl = ratio.masked_fill(~rollout.response_mask, 0).sum(-1, keepdim=True)
    given = rollout.preference
    gain = ((1 - given.alpha[:, None]) * given.weights * scores.raw).sum(-1, keepdim=True)
    advantage = gain - given.alpha[:, None] * kl
    loss = -(advantage * logp).masked_fill(~rollout.response_mask, 0).sum() / len(rollout)
    trained = list(module.policy.trained_parameters().values())
    expected = torch.autograd.grad(loss, trained)
    by_id = {
        id(p): g
        for p, g in zip(
            [p for group in module.optimizers().param_groups for p in group["params"]],  # type: ignore[union-attr]
            found[0],
            strict=True,
        )
    }
    for parameter, grad in zip(trained, expected, strict=True):
        torch.testing.assert_close(by_id[id(parameter)], grad, rtol=1e-5, atol=1e-7)
