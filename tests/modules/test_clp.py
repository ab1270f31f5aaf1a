"""One training step: what must move, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clp_lightning import (
    AnnealedAlpha,
    CLPCallback,
    CLPModule,
    Critic,
    Fixed,
    FixedAlpha,
    LoRA,
    Mixture,
    Policy,
    Pretrained,
    PromptBatch,
    PromptText,
    Rollout,
    SoftPrompt,
    Vertices,
)
from clp_lightning.policy import Sampling, TransformersEngine
from tests.modules.gradients import gradients, norm, of_copy
from tests.runs import Capture, Counted, Perturbed, kind, make_data, make_module, make_trainer

# -- what must move --------------------------------------------------------------------------------


def weights_after_two_steps(
    base: Pretrained, folder: Path, callback: CLPCallback | None = None, **options: Any
) -> dict[str, Tensor]:
    module = make_module(base, Perturbed, **options)
    make_trainer(folder, callback or CLPCallback(alpha=FixedAlpha(0.3))).fit(
        module, make_data(folder)
    )
    return {name: p.detach().clone() for name, p in module.policy.trained_parameters().items()}


@pytest.mark.parametrize(
    "options",
    [
        {"callback": CLPCallback(alpha=FixedAlpha(0.5))},
        {"callback": CLPCallback(Fixed({"kind": 0.2, "short": 0.8}), FixedAlpha(0.3))},
        {"callback": CLPCallback(alpha=FixedAlpha(0.3), per="batch")},
        {"samples_per_prompt": 4},
        {"max_new_tokens": 4},
        {"temperature": 0.8},
        {"truncation_penalty": 0.5},
        {"statistics_prompts": 4},
        {"statistics_samples": 3},
        {"std_floor": {"kind": 9.0}},
        {"rewards": {"kind": kind, "short": Counted(target=2)}},
        {"lr": 2e-2},
        {"weight_decay": 0.1},
        {"warmup_steps": 2},
        {"optimizer": torch.optim.SGD},
        {"max_prompt_tokens": 4},
        {"seed": 4},
        {"conditioner": LoRA(rank=2, shared_rank=2, scale=3.0)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_knob_moves_the_weights(
    options: dict[str, Any], base: Pretrained, tmp_path: Path
) -> None:
    before = weights_after_two_steps(base, tmp_path)
    after = weights_after_two_steps(base, tmp_path, **options)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_lr_shared_moves_the_shared_part_alone(base: Pretrained, tmp_path: Path) -> None:
    trainer = {"max_steps": 1}
    states = []
    for lr_shared in (None, 1e-3):
        module, _ = gradients(
            base, tmp_path, trainer=trainer, lr=1e-2, lr_shared=lr_shared, optimizer=Capture
        )
        states.append(module.policy.trained_parameters())
        assert Capture.rates == [[1e-2, lr_shared or 1e-2]]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]) == ("shared" not in name)


def test_warmup_and_a_scheduler(base: Pretrained, tmp_path: Path) -> None:
    gradients(
        base,
        tmp_path,
        lr=1.0,
        warmup_steps=3,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.5),
    )
    found = [rates[0] for rates in Capture.rates]
    assert found == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.5, 0.5, 0.5])


@pytest.mark.parametrize(
    ("decay", "shares"),
    [
        ("linear", [1 - step / 8 for step in range(8)]),
        ("cosine", [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]),
    ],
)
def test_decay_ends_at_zero(
    decay: str, shares: list[float], base: Pretrained, tmp_path: Path
) -> None:
    gradients(base, tmp_path, lr=1.0, lr_decay=decay)
    assert [rates[0] for rates in Capture.rates] == pytest.approx(shares)


@pytest.mark.parametrize(
    ("decay", "rest"),
    [("linear", [1 / 4, 1 / 8]), ("cosine", [(1 + math.cos(math.pi * s / 8)) / 2 for s in (6, 7)])],
)
def test_decay_of_a_run_that_is_made_longer(
    decay: str, rest: list[float], base: Pretrained, tmp_path: Path
) -> None:
    """It neither stays at 0, where the shorter run ended, nor rises again."""
    options = {"lr": 1.0, "lr_decay": decay, "optimizer": Capture}
    trainer = make_trainer(tmp_path, max_steps=4)
    trainer.fit(make_module(base, **options), make_data(tmp_path))
    trainer.save_checkpoint(tmp_path / "short.ckpt")
    Capture.rates = []
    longer = make_trainer(tmp_path, max_steps=8)
    longer.fit(make_module(base, **options), make_data(tmp_path), ckpt_path=tmp_path / "short.ckpt")
    found = [rates[0] for rates in Capture.rates]
    assert len(found) == 4 and found[0] == 0  # the first step's was set before the stop
    assert found[2:] == pytest.approx(rest)


def test_decay_needs_an_end(base: Pretrained, tmp_path: Path) -> None:
    module = make_module(base, lr_decay="cosine")
    trainer = make_trainer(tmp_path, max_steps=-1, max_epochs=-1)
    with pytest.raises(ValueError, match="set the Trainer's max_steps or max_epochs"):
        trainer.fit(module, make_data(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1e-3}, "must be finite and 0 or more; got -0.001"),
        ({"lr_shared": -1.0}, "must be finite and 0 or more"),
        ({"lr": math.inf}, "must be finite and 0 or more; got inf"),
        (
            {"lr_decay": "linear", "lr_scheduler": torch.optim.lr_scheduler.ConstantLR},
            "leave one out",
        ),
    ],
)
def test_learning_rates_that_make_no_sense(
    options: dict[str, Any], message: str, base: Pretrained
) -> None:
    with pytest.raises(ValueError, match=message):
        make_module(base, **options)


def test_nothing_to_train_is_refused(base: Pretrained, tmp_path: Path) -> None:
    module = make_module(base, conditioner=PromptText(rest=Mixture(rest="freeze")))
    with pytest.raises(ValueError, match="Nothing of the policy is trained"):
        make_trainer(tmp_path).fit(module, make_data(tmp_path))


def test_a_part_of_one_module_is_refused_by_another(base: Pretrained) -> None:
    for part in ({"conditioner": LoRA()}, {"conditioner": SoftPrompt(LoRA(shared_rank=2))}):
        make_module(base, **part).configure_model()
        with pytest.raises(ValueError, match="belongs to another policy; make a new one"):
            make_module(base, **part).configure_model()
    critic = Critic()
    make_module(base, critic=critic).configure_model()
    with pytest.raises(ValueError, match="Critic belongs to another module"):
        make_module(base, critic=critic).configure_model()
    rest = LoRA(shared_rank=2)
    make_module(base, conditioner=SoftPrompt(rest)).configure_model()
    with pytest.raises(ValueError, match="belongs to another"):
        make_module(base, conditioner=SoftPrompt(rest)).configure_model()


def test_idle_copies_rest(base: Pretrained, tmp_path: Path) -> None:
    module, found = gradients(
        base,
        tmp_path,
        CLPCallback(Vertices(), FixedAlpha(0.1), per="step"),
        data={"batch_size": 1},
        trainer={"accumulate_grad_batches": 2},
        conditioner=LoRA(rank=2, shared_rank=0),
    )
    chosen = set()
    for step, grads in enumerate(found):
        used = module.seen[2 * step][0].preference.weights[0].argmax().item()
        assert used == module.seen[2 * step + 1][0].preference.weights[-1].argmax().item()
        assert all(g is not None and g.any() for g in of_copy(module, grads, used))
        assert not any(g is not None for g in of_copy(module, grads, 1 - used))
        chosen.add(used)
    assert chosen == {0, 1}


# -- the Trainer's own features ----------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_train_mode_is_for_checkpoints_only(
    base: Pretrained, tmp_path: Path, checkpointing: bool, recwarn: pytest.WarningsRecorder
) -> None:
    class Look(CLPModule):
        def measure(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
            modes.append(self.policy.model.training)
            return super().measure(rollout)

    modes: list[bool] = []
    module = make_module(base, Look, gradient_checkpointing=checkpointing)
    make_trainer(tmp_path, CLPCallback(), max_steps=2).fit(module, make_data(tmp_path))
    assert modes and set(modes) == {checkpointing}
    module.train()
    assert module.policy.model.training is checkpointing
    assert not any("eval mode" in str(warning.message) for warning in recwarn)


def test_clipping(base: Pretrained, tmp_path: Path) -> None:
    _, free = gradients(base, tmp_path)
    bound = norm(free[0]) / 2
    _, clipped = gradients(base, tmp_path, trainer={"gradient_clip_val": bound})
    assert norm(clipped[0]) == pytest.approx(bound, rel=1e-4)


def test_bf16_mixed_precision(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    base = Pretrained(str(tiny_folder()))
    _, exact = gradients(base, tmp_path, trainer={"max_steps": 1})
    _, mixed = gradients(base, tmp_path, trainer={"max_steps": 1, "precision": "bf16-mixed"})
    (first,), (second,) = exact, mixed
    assert all(g is not None and g.isfinite().all() and g.dtype == torch.float32 for g in second)
    assert first[0] is not None and second[0] is not None
    assert not torch.equal(first[0], second[0])


def test_what_is_logged(base: Pretrained, tmp_path: Path) -> None:
    callback = CLPCallback(alpha=FixedAlpha(0.3))
    module = make_module(base, Perturbed, optimizer=Capture, lr=0.0)
    trainer = make_trainer(tmp_path, callback, max_steps=1, accumulate_grad_batches=2)
    Capture.gradients.clear()
    trainer.fit(module, make_data(tmp_path))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    raw = torch.cat([scores.raw for _, scores in module.seen])
    rollouts = [rollout for rollout, _ in module.seen]
    weights = torch.cat([rollout.preference.weights for rollout in rollouts])
    lengths = torch.cat([rollout.lengths for rollout in rollouts])
    for i, name in enumerate(["kind", "short"]):
        assert logged[f"train/reward/{name}"] == pytest.approx(float(raw[:, i].mean()), rel=1e-5)
        normalized = (raw[:, i] - module.rewards.mean[i]) / module.rewards.std[i]
        assert logged[f"train/normalized/{name}"] == pytest.approx(float(normalized.mean()))
        high = raw[:, i][weights[:, i] > 2 / 3]
        if len(high):
            assert logged[f"train/reward_by_weight/{name}/high"] == pytest.approx(
                float(high.mean()), rel=1e-5
            )
        assert 0 <= logged[f"train/without_spread/{name}"] <= 1
        assert logged[f"train/abstained/{name}"] == 0
    assert logged["train/length"] == pytest.approx(float(lengths.double().mean()))
    truncated = torch.cat([rollout.truncated for rollout in rollouts])
    assert logged["train/truncated"] == pytest.approx(float(truncated.double().mean()))
    assert logged["train/grad_norm"] == pytest.approx(norm(Capture.gradients[0]), rel=1e-5)
    assert {"train/kl", "train/value", "train/entropy", "train/loss"} <= logged.keys()
    shown = {"train/value", "train/reward/kind", "train/reward/short"}
    assert shown <= trainer.progress_bar_metrics.keys()


# -- mistakes ----------------------------------------------------------------------------------


def test_without_the_callback_it_says_so(base: Pretrained, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, CLPCallback(), max_steps=1)
    trainer.callbacks.pop(0)
    with pytest.raises(ValueError, match="The batch has no preference; add CLPCallback"):
        trainer.fit(make_module(base, statistics_prompts=0), make_data(tmp_path))


def test_alpha_is_annealed_over_the_run(base: Pretrained, tmp_path: Path) -> None:
    callback = CLPCallback(alpha=AnnealedAlpha(0.8, 0.0, 0.5))
    module, _ = gradients(base, tmp_path, callback, trainer={"max_steps": 8, "max_epochs": -1})
    alphas = [float(rollout.preference.alpha[0]) for rollout, _ in module.seen]
    assert alphas == pytest.approx([0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples_per_prompt": 1}, "samples_per_prompt is 1; .* at least 2"),
        ({"rollout_batches": 0}, "rollout_batches must be at least 1; got 0"),
        ({"rollout_chunks": 0}, "rollout_chunks must be at least 1; got 0"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens must be at least 1"),
        ({"temperature": 0.0}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"rewards": {}}, "There is no reward; name at least one"),
        ({"rewards": {"a/b": kind}}, "'a/b' cannot be the name of a reward"),
        ({"rewards": {"kind": 3}}, "Reward 'kind' is a int"),
        ({"std_floor": {"kin": 1.0}}, r"std_floor names \['kin'\]; the rewards are"),
        ({"std_floor": 0.0}, "std_floor must be above 0"),
        ({"std_floor": {"kind": math.nan}}, "std_floor must be above 0 and finite"),
        ({"reward_timeout": 0}, "reward_timeout is a number of seconds above 0"),
        ({"reward_retries": -1}, "reward_retries is a whole number, 0 or more; got -1"),
        ({"max_kl": math.nan}, "max_kl must be above 0; got nan"),
        ({"max_kl": -1.0}, "max_kl must be above 0; got -1"),
        ({"reference_point": [math.nan, 0.0]}, "reference_point must be finite"),
        ({"reference_point": [0.0]}, "reference_point needs one number for each"),
        ({"on_reward_error": "skip"}, "on_reward_error is 'raise' or 'drop', not 'skip'"),
        ({"eval_samples": 0}, "eval_samples must be at least 1"),
        ({"statistics_samples": 0}, "statistics_samples must be at least 1"),
        ({"statistics_prompts": -1}, "statistics_prompts must be 0"),
        ({"truncation_penalty": math.inf}, "truncation_penalty must be a finite number; got inf"),
    ],
)
def test_bad_arguments_are_refused_at_once(
    options: dict[str, Any], message: str, base: Pretrained
) -> None:
    with pytest.raises(ValueError, match=message):
        make_module(base, **options)


class Counts(TransformersEngine):
    """Notes how many responses are sampled at once; does not start as the engine does."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def generate(self, policy: Policy, batch: PromptBatch, n: int, sampling: Sampling) -> Rollout:
        self.rows.append(len(batch) * n)
        return super().generate(policy, batch, n, sampling)


def test_no_more_than_eval_rows_are_sampled_at_once(base: Pretrained, tmp_path: Path) -> None:
    fronts = []
    for limit in (5, 100):
        engine = Counts()
        options: dict[str, Any] = {"statistics_prompts": 0, "eval_samples": 2, "eval_rows": limit}
        module = make_module(base, engine=engine, **options)
        trainer = make_trainer(tmp_path, limit_val_batches=None)
        trainer.validate(module, make_data(tmp_path, eval_batch_size=4), verbose=False)
        fronts.append(module.front_report.to_dict())
        # 4 prompts x (the reference + 3 points) x 2 samples.
        assert sum(engine.rows) == 32 and max(engine.rows) == (4 if limit == 5 else 24)
    assert fronts[0]["reference"] == fronts[1]["reference"]
