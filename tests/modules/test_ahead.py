"""Rewards that score a part of a step's responses while the next part is sampled."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from clp_lightning import Mixture, Policy, Pretrained, PromptBatch, Rollout
from clp_lightning.policy import Sampling, TransformersEngine
from tests.helpers import assert_alike
from tests.modules.gradients import gradients
from tests.runs import kind, make_data, make_module, make_trainer, picky

_SECONDS = 20.0  # after which what should meet has not met


# -- what must be equal --------------------------------------------------------------------------


async def later(completions: list[str], **_: Any) -> list[float]:
    await asyncio.sleep(0)
    return [float(len(text)) for text in completions]


def telling(completions: list[str], log_metric: Any, log_extra: Any, **_: Any) -> list[float]:
    log_metric("vowels", sum(c in "aeiou" for text in completions for c in text) / len(completions))
    log_extra("text", completions)
    return kind(completions)


TWO_SLICES: dict[str, Any] = {
    "trainer": {"accumulate_grad_batches": 2, "max_steps": 2, "max_epochs": -1},
    "rollout_batches": 2,
    "data": {"batch_size": 3},  # 6 prompts in a batch
}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "two": (2, {}),
    "uneven": (3, {}),
    "every prompt": (4, {}),
    "async": (2, {"rewards": {"kind": telling, "later": later}}),
    "one copy for all": (2, {"conditioner": Mixture}),
    "a chunk of two slices": (2, TWO_SLICES | {"rewards": {"kind": telling, "later": later}}),
    "chunks across slices": (4, TWO_SLICES),
    "drop": (
        4,
        {
            "rewards": {"kind": telling, "picky": picky},
            "on_reward_error": "drop",
            "max_dropped": 1.0,
        },
    ),
    "time limit": (2, {"reward_timeout": 30.0, "rewards": {"kind": kind, "later": later}}),
}


@pytest.mark.filterwarnings("ignore:Reward 'picky':UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_chunks_change_nothing(name: str, base: Pretrained, tmp_path: Path) -> None:
    chunks, options = CASES[name]
    found = {}
    for number in (1, chunks):
        engine = Calls()
        given = {
            "data": {"batch_size": 4},
            "trainer": {"max_steps": 2, "max_epochs": -1},
        } | options
        if "conditioner" in options:
            given["conditioner"] = options["conditioner"]()
        module, grads = gradients(
            base, tmp_path, lr=1e-2, engine=engine, rollout_chunks=number, **given
        )
        found[number] = module, grads, engine.prompts
    (one, expected, whole), (several, grads, parts) = found[1], found[chunks]
    training = slice(-len(several.seen) // several.rollout_batches * chunks, None)
    assert sum(parts[training]) == sum(whole[-len(one.seen) // one.rollout_batches :])
    assert max(parts[training]) < max(whole)
    assert len(one.seen) == len(several.seen) >= 2
    for (rollout, scores), (its, theirs) in zip(several.seen, one.seen, strict=True):
        assert_alike(rollout, its)
        torch.testing.assert_close(scores.raw, theirs.raw, rtol=0, atol=0, equal_nan=True)
    assert len(grads) == len(expected)
    for step in range(len(grads)):
        for a, b in zip(grads[step], expected[step], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
    weights = [module.policy.trained_parameters() for module in (one, several)]
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-8, atol=1e-10)
    assert several.step_report == pytest.approx(one.step_report, rel=1e-7, abs=1e-10)
    assert several.rewards.metrics == pytest.approx(one.rewards.metrics)
    assert several.rewards.extra == one.rewards.extra
    assert several.rewards.dropped == one.rewards.dropped
    assert (several.rewards.dropped > 0) == (name == "drop")
    assert several.rewards.problems == one.rewards.problems
    assert not several.asked and several._sampled is not None and not several._sampled.asked


class Calls(TransformersEngine):
    """Notes for how many prompts it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts: list[int] = []

    def generate(self, policy: Policy, batch: PromptBatch, n: int, sampling: Sampling) -> Rollout:
        rollout = super().generate(policy, batch, n, sampling)
        self.prompts.append(len(batch))
        return rollout


# -- what happens at the same time ---------------------------------------------------------------


class Meeting(TransformersEngine):
    """At its second call it waits for somebody."""

    def __init__(self) -> None:
        super().__init__()
        self.there, self.calls = threading.Barrier(2), 0

    def generate(self, policy: Policy, batch: PromptBatch, n: int, sampling: Sampling) -> Rollout:
        self.calls += 1
        if self.calls == 2:
            self.there.wait(_SECONDS)
        return super().generate(policy, batch, n, sampling)


def fit_once(base: Pretrained, folder: Path, **options: Any) -> Any:
    module = make_module(base, statistics_prompts=0, **options)
    make_trainer(folder, max_steps=1).fit(module, make_data(folder, batch_size=4))
    return module


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_next_part_is_sampled_while_the_last_is_scored(
    asynchronous: bool, base: Pretrained, tmp_path: Path
) -> None:
    engine = Meeting()
    calls = []

    def meeting(completions: list[str], **_: Any) -> list[float]:
        calls.append(len(completions))
        if len(calls) == 1:
            engine.there.wait(_SECONDS)  # until the engine samples the next part
        return kind(completions)

    async def meeting_later(completions: list[str], **_: Any) -> list[float]:
        return await asyncio.to_thread(meeting, completions)

    reward = meeting_later if asynchronous else meeting
    fit_once(base, tmp_path, rewards={"met": reward}, engine=engine, rollout_chunks=2)
    assert calls == [6, 6] and not engine.there.broken


def test_functions_are_called_one_after_the_other_and_coroutines_together(
    base: Pretrained, tmp_path: Path
) -> None:
    parts = threading.Barrier(4)
    order: list[str] = []
    engine = Calls()

    def function(completions: list[str], **_: Any) -> list[float]:
        order.append("in")
        for _ in range(200):  # until the last part waits for its turn
            threading.Event().wait(0.1)
            if len(engine.prompts) == 4:
                break
        threading.Event().wait(0.2)
        order.append("out")
        return kind(completions)

    async def coroutine(completions: list[str], **_: Any) -> list[float]:
        await asyncio.to_thread(parts.wait, _SECONDS)  # for those about the other parts
        return kind(completions)

    rewards = {"function": function, "coroutine": coroutine}
    fit_once(base, tmp_path, rewards=rewards, engine=engine, rollout_chunks=4)
    assert order == ["in", "out"] * 4 and not parts.broken
