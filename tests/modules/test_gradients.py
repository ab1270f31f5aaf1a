"""One training step: what must be equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clp_lightning import (
    CLPCallback,
    Fixed,
    FixedAlpha,
    LoRA,
    Mixture,
    Policy,
    Pretrained,
    PromptBatch,
    Rollout,
    Sampling,
    TransformersEngine,
)
from clp_lightning.conditioning import Weights
from tests.helpers import prompt_batch
from tests.modules.gradients import assert_same, by_hand, gradient_by_hand, gradients, mean, of_copy
from tests.runs import (
    Capture,
    Perturbed,
    fails_on_tea,
    kind,
    make_data,
    make_module,
    make_trainer,
    picky,
)

# -- what must be equal ------------------------------------------------------------------------


@pytest.mark.parametrize("kl", ["response", "to_go"])
def test_gradient_by_hand(kl: str, base: Pretrained, tmp_path: Path) -> None:
    module, found = gradients(base, tmp_path, kl=kl)
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


class Counting(TransformersEngine):
    """Notes under how many preferences it samples at once."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def generate(self, policy: Policy, batch: PromptBatch, n: int, sampling: Sampling) -> Rollout:
        assert batch.preference is not None
        self.asked.append(len(batch.preference.weights.unique(dim=0)))
        return super().generate(policy, batch, n, sampling)


def test_full_rank_rollouts_by_row_and_training_merged(base: Pretrained, tmp_path: Path) -> None:
    more: dict[str, Any] = {"data": {"batch_size": 1}, "trainer": {"accumulate_grad_batches": 2}}
    _, expected = gradients(base, tmp_path, conditioner=Mixture(), **more)
    more |= {"rollout_batches": 2, "engine": (engine := Counting())}
    _, found = gradients(base, tmp_path, conditioner=Mixture(), **more)
    assert 2 in engine.asked and len(found) == len(expected)
    for step in range(len(found)):
        assert_same(found[step], expected[step])


def test_rows_mixed_in_training_are_merged_batches_of_one(base: Pretrained, tmp_path: Path) -> None:
    mixed, rows = gradients(base, tmp_path, conditioner=Mixture(mixing="row"))
    _, merged = gradients(
        base,
        tmp_path,
        conditioner=Mixture(),
        data={"batch_size": 1},
        trainer={"accumulate_grad_batches": 2},
    )
    weights = mixed.seen[0][0].preference.weights
    assert len(weights.unique(dim=0)) == 2  # a preference of its own for each prompt
    for step in range(len(rows)):
        assert_same(rows[step], merged[step])


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

DROPS: dict[str, Any] = {"on_reward_error": "drop", "max_dropped": 1.0}


def fails_always(completions: list[str], **_: Any) -> list[float]:
    raise ConnectionError("nobody there")


def test_dropped_responses_do_not_count(base: Pretrained, tmp_path: Path) -> None:
    module, found = gradients(base, tmp_path, rewards={"kind": kind, "picky": picky}, **DROPS)
    kept = [len(rollout) for rollout, _ in module.seen]
    assert {3, 6} & set(kept) and {4, 5} & set(kept)
    for number in [number for number, rows in enumerate(kept) if rows >= 3]:
        expected = gradient_by_hand(module, number)
        for a, b in zip(found[number], expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_the_kept_of_a_window_weigh_alike(base: Pretrained, tmp_path: Path) -> None:
    rewards = {"kind": kind, "picky": picky}
    options: dict[str, Any] = {"rewards": rewards, **DROPS}
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
        **DROPS,
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
    _, found = gradients(base, tmp_path, rewards=rewards, statistics_prompts=0, **DROPS)
    assert len(found) == 8
    assert all(g is None or not g.any() for step in found for g in step)


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
