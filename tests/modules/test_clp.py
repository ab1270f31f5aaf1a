"""One training step: what must be equal, and what must move."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clp_lightning import (
    AnnealedAlpha,
    CLPCallback,
    Fixed,
    FixedAlpha,
    LoRA,
    Pretrained,
    Vertices,
)
from clp_lightning.conditioning import Weights
from clp_lightning.rewards import Scores
from clp_lightning.types import Rollout
from tests.helpers import prompt_batch
from tests.runs import (
    Capture,
    Counted,
    Perturbed,
    fails_on_tea,
    kind,
    make_data,
    make_module,
    make_trainer,
    picky,
)
from tests.tiny import EOS

Gradients = list[Tensor | None]


@pytest.fixture
def base(tiny_folder: Callable[..., Path]) -> Pretrained:
    """Double precision, so that what must be equal is; every third token ends a response.

    GPT-2, because Llama's norms compute in single precision whatever the weights are.
    """
    stop = [EOS, *range(68, 102)]
    folder = tiny_folder("gpt2", generation={"eos_token_id": stop})
    return Pretrained(str(folder), dtype="float64")


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
    """The loss of DESIGN section 3, response by response and token by token."""
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

        def to_go(row: int, t: int) -> Tensor:
            return ratio[row, t:][rollout.response_mask[row, t:]].sum()

        for t in range(int(rollout.lengths[b])):
            others_kl = sum(to_go(s, t) for s in siblings) / len(siblings)
            loss = loss - (gain - alpha * (to_go(b, t) - others_kl)) * logp[b, t]
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


# -- what must be equal ------------------------------------------------------------------------


def test_gradient_by_hand(base: Pretrained, tmp_path: Path) -> None:
    module, found = gradients(base, tmp_path)
    assert len(found) == 8
    assert_same(found[0], gradient_by_hand(module, 0))
    assert_same(found[5], gradient_by_hand(module, 5))
    rollout, _ = module.seen[0]
    assert len(rollout.lengths.unique()) > 1
    truncated = torch.cat([rollout.truncated for rollout, _ in module.seen])
    assert 0 < truncated.sum() < len(truncated)


def test_one_batch_of_8_and_four_of_2_and_an_incomplete_window(
    base: Pretrained, tmp_path: Path
) -> None:
    _, single = gradients(base, tmp_path)
    _, eight = gradients(base, tmp_path, data={"batch_size": 8})
    _, four = gradients(base, tmp_path, trainer={"accumulate_grad_batches": 4})
    _, three = gradients(base, tmp_path, trainer={"accumulate_grad_batches": 3})
    assert [len(single), len(eight), len(four), len(three)] == [8, 2, 2, 3]
    for step in range(2):
        assert_same(eight[step], mean(single[4 * step : 4 * step + 4]))
        assert_same(four[step], eight[step])
    for step in range(3):  # windows of 3, 3 and 2 batches
        assert_same(three[step], mean(single[3 * step : 3 * step + 3]))


@pytest.mark.parametrize("per", ["prompt", "batch", "step"])
@pytest.mark.parametrize("accumulate", [2, 4])
def test_rollout_batches(per: Any, accumulate: int, base: Pretrained, tmp_path: Path) -> None:
    trainer = {"accumulate_grad_batches": accumulate}
    callback = CLPCallback(alpha=FixedAlpha(0.3), per=per)
    one, expected = gradients(base, tmp_path, callback, trainer=trainer)
    two, found = gradients(base, tmp_path, callback, trainer=trainer, rollout_batches=2)
    assert len(found) == len(expected) == 8 // accumulate
    for step in range(len(found)):
        assert_same(found[step], expected[step])
    assert len(one.seen) == len(two.seen)


def test_rollout_batches_must_divide_the_window(base: Pretrained, tmp_path: Path) -> None:
    module = make_module(base, rollout_batches=2)
    trainer = make_trainer(tmp_path, accumulate_grad_batches=3)
    with pytest.raises(ValueError, match="rollout_batches=2 must divide accumulate_grad_batches=3"):
        trainer.fit(module, make_data(tmp_path))
    assert not module.policy.is_built


def test_gradient_checkpointing(base: Pretrained, tmp_path: Path) -> None:
    _, expected = gradients(base, tmp_path)
    _, found = gradients(base, tmp_path, gradient_checkpointing=True)
    for step in range(len(found)):
        assert_same(found[step], expected[step])


def test_one_hot_weights_are_plain_finetuning(base: Pretrained, tmp_path: Path) -> None:
    def plain() -> LoRA:
        return LoRA(rank=2, shared_rank=0, coefficients=Weights())

    both, found = gradients(
        base,
        tmp_path,
        CLPCallback(Fixed({"kind": 1, "short": 0}), FixedAlpha(0.3)),
        conditioner=plain(),
    )
    alone, expected = gradients(
        base,
        tmp_path,
        CLPCallback(Fixed({"kind": 1}), FixedAlpha(0.3)),
        conditioner=plain(),
        rewards={"kind": kind},
    )
    for step in range(len(found)):
        assert_same(of_copy(both, found[step], 0), of_copy(alone, expected[step], 0))
        assert not any(grad is not None for grad in of_copy(both, found[step], 1))
    losses = [float(by_hand(module, *module.seen[0]).detach()) for module in (both, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12) and losses[0] != 0


# -- dropped responses ---------------------------------------------------------------------------


def fails_always(completions: list[str], **_: Any) -> list[float]:
    raise ConnectionError("nobody there")


def test_dropped_responses_do_not_count(base: Pretrained, tmp_path: Path) -> None:
    module, found = gradients(
        base, tmp_path, rewards={"kind": kind, "picky": picky}, on_reward_error="drop"
    )
    kept = [len(rollout) for rollout, _ in module.seen]
    assert {3, 6} & set(kept) and {4, 5} & set(kept)
    for number in [number for number, rows in enumerate(kept) if rows >= 3]:
        expected = gradient_by_hand(module, number)
        for a, b in zip(found[number], expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_the_kept_of_a_window_weigh_alike(base: Pretrained, tmp_path: Path) -> None:
    rewards = {"kind": kind, "picky": picky}
    options: dict[str, Any] = {"rewards": rewards, "on_reward_error": "drop"}
    module, single = gradients(base, tmp_path, **options)
    _, four = gradients(base, tmp_path, trainer={"accumulate_grad_batches": 4}, **options)
    kept = torch.tensor([float(len(rollout)) for rollout, _ in module.seen[:4]])
    for column, found in zip(zip(*single[:4], strict=True), four[0], strict=True):
        scaled = [n * g for n, g in zip(kept, column, strict=True) if g is not None]
        expected = torch.stack(scaled).sum(0) / kept.sum()
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_a_batch_may_lose_all_its_responses(base: Pretrained, tmp_path: Path) -> None:
    module, found = gradients(
        base,
        tmp_path,
        data={"batch_size": 1},
        trainer={"accumulate_grad_batches": 2},
        rewards={"kind": kind, "tea": fails_on_tea},
        on_reward_error="drop",
    )
    kept = [len(rollout) for rollout, _ in module.seen]
    assert 0 in kept and 3 in kept
    assert all(g is None or g.isfinite().all() for step in found for g in step)
    # A window of a lost batch and a whole one is the whole one alone.
    window = next(i for i in range(8) if sorted(kept[2 * i : 2 * i + 2]) == [0, 3])
    number = 2 * window + (kept[2 * window] == 0)
    assert_same(found[window], gradient_by_hand(module, number))


def test_a_step_may_lose_all_its_responses(base: Pretrained, tmp_path: Path) -> None:
    rewards = {"kind": kind, "dead": fails_always}
    _, found = gradients(
        base, tmp_path, rewards=rewards, on_reward_error="drop", statistics_prompts=0
    )
    assert len(found) == 8
    assert all(g is None or not g.any() for step in found for g in step)


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


def norm(grads: Gradients) -> float:
    return float(torch.cat([g.flatten() for g in grads if g is not None]).norm())


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
    with pytest.raises(RuntimeError, match="The batch has no preference; add CLPCallback"):
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
        ({"max_prompt_tokens": 0}, "max_prompt_tokens must be at least 1"),
        ({"temperature": 0.0}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"rewards": {}}, "There is no reward; name at least one"),
        ({"rewards": {"a/b": kind}}, "'a/b' cannot be the name of a reward"),
        ({"rewards": {"kind": 3}}, "Reward 'kind' is a int"),
        ({"std_floor": {"kin": 1.0}}, r"std_floor names \['kin'\]; the rewards are"),
        ({"std_floor": 0.0}, "std_floor must be above 0"),
        ({"reference_point": [0.0]}, "reference_point needs one number for each"),
        ({"on_reward_error": "skip"}, "on_error is 'raise' or 'drop', not 'skip'"),
        ({"eval_samples": 0}, "eval_samples must be at least 1"),
        ({"statistics_samples": 0}, "statistics_samples must be at least 1"),
    ],
)
def test_bad_arguments_are_refused_at_once(
    options: dict[str, Any], message: str, base: Pretrained
) -> None:
    with pytest.raises(ValueError, match=message):
        make_module(base, **options)


@pytest.mark.parametrize("sizes", [(2, 2), (3, 1)])
def test_batches_of_a_loader_of_the_users_own(
    base: Pretrained, tmp_path: Path, sizes: tuple[int, int]
) -> None:
    """No ``nominal_size``, and micro-batches of any size: every response counts alike."""
    rows = prompt_batch(["ab", "cd", "ef", "gh"])
    found = []
    for parts in ((4,), sizes):
        Capture.gradients.clear()
        module = make_module(base, Perturbed, optimizer=Capture, lr=0.0, statistics_prompts=0)
        ends = torch.tensor(parts).cumsum(0).tolist()
        batches = [rows.select(range(e - n, e)) for e, n in zip(ends, parts, strict=True)]
        loader = torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        callback = CLPCallback(alpha=FixedAlpha(0.3))
        runner = make_trainer(tmp_path, callback, max_steps=1, accumulate_grad_batches=len(parts))
        runner.fit(module, loader)
        found.append(Capture.gradients[0])
    assert_same(found[1], found[0])
