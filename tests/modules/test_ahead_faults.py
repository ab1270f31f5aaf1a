"""Rewards asked ahead of time: what goes wrong, and who overrides what."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from clp_lightning import (
    CLPCallback,
    CLPModule,
    FixedAlpha,
    Policy,
    Pretrained,
    PromptBatch,
    Rollout,
)
from clp_lightning.modules.ahead import sample
from clp_lightning.policy import Sampling, TransformersEngine
from clp_lightning.rewards import RewardError, Scores
from tests.helpers import prompt_batch
from tests.modules.gradients import assert_same, gradients
from tests.runs import Counted, Perturbed, kind, make_data, make_module, make_trainer

_SECONDS = 20.0

# -- what goes wrong -----------------------------------------------------------------------------


class Fails:
    """Fails on responses to some prompts."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __call__(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        scores = kind(completions)
        for row, prompt in enumerate(prompts):
            if "zip" in prompt and self.how == "raises":
                raise ConnectionError("nobody there")
            if "zip" in prompt:
                scores[row] = math.nan
        return scores


@pytest.mark.filterwarnings("ignore:Reward 'failing':UserWarning")
@pytest.mark.parametrize("how", ["raises", "returns NaN"])
@pytest.mark.parametrize("retries", [0, 1])
def test_a_fault_is_told_as_without_chunks(
    how: str,
    retries: int,
    base: Pretrained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("clp_lightning.rewards.faults.time.sleep", lambda _: None)
    texts = []
    for chunks in (1, 4):
        module = make_module(
            base,
            rewards={"kind": kind, "failing": Fails(how)},
            rollout_chunks=chunks,
            reward_retries=retries,
            statistics_prompts=0,
        )
        with pytest.raises(RewardError, match="'failing' .*Prompt: 'zip") as caught:
            make_trainer(tmp_path, max_epochs=1, max_steps=-1).fit(
                module, make_data(tmp_path, batch_size=4)
            )
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    assert ("2 times in a row" in texts[0]) == bool(retries)


def test_a_reward_that_hangs_is_given_up(base: Pretrained, tmp_path: Path) -> None:
    def hangs(completions: list[str], **_: Any) -> list[float]:
        threading.Event().wait()
        return kind(completions)

    options = {"rewards": {"hanging": hangs}, "rollout_chunks": 2, "reward_timeout": 0.2}
    module = make_module(base, statistics_prompts=0, **options)
    with pytest.raises(RewardError, match=r"'hanging' did not answer within 0\.2 s"):
        make_trainer(tmp_path).fit(module, make_data(tmp_path, batch_size=4))


class Interrupted(TransformersEngine):
    """Is interrupted at its third call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def generate(self, policy: Policy, batch: PromptBatch, n: int, sampling: Sampling) -> Rollout:
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt
        return super().generate(policy, batch, n, sampling)


def hanging_module(base: Any, release: threading.Event, asked: list[int]) -> CLPModule:
    """Is interrupted in the third part, while its reward hangs in the first."""

    def hangs(completions: list[str], **_: Any) -> list[float]:
        asked.append(len(completions))
        release.wait()
        return kind(completions)

    module: CLPModule = make_module(
        base, rewards={"hanging": hangs, "kind": kind}, rollout_chunks=4, engine=Interrupted()
    )
    module.configure_model()
    return module


def test_after_an_interrupt_nothing_is_asked_any_more(base: Pretrained) -> None:
    release, asked = threading.Event(), list[int]()
    before = set(threading.enumerate())
    module = hanging_module(base, release, asked)
    with pytest.raises(KeyboardInterrupt):
        sample(module, prompt_batch(["ab", "c", "def", "g"]))
    left = set(threading.enumerate()) - before
    assert left and all(thread.daemon for thread in left)
    release.set()
    for thread in left:
        thread.join(_SECONDS)
    assert asked == [3] and not any(thread.is_alive() for thread in left)


def test_an_interrupt_ends_the_process(base: Pretrained) -> None:
    code = (
        "import sys, threading\n"
        "from clp_lightning import Pretrained\n"
        "from clp_lightning.modules.ahead import sample\n"
        "from tests.helpers import assert_alike, prompt_batch\n"
        "from tests.modules.test_ahead_faults import hanging_module\n"
        "module = hanging_module(Pretrained(sys.argv[1]), threading.Event(), [])\n"
        "sample(module, prompt_batch(['ab', 'c', 'def', 'g']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, base.name],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "KeyboardInterrupt" in done.stderr and done.returncode != 0


# -- subclasses ----------------------------------------------------------------------------------


class Shouts(Perturbed):
    """Changes what was sampled, in place."""

    def rollout(self, batch: PromptBatch) -> Rollout:
        rollout = super().rollout(batch)
        rollout.completions = [text.upper() for text in rollout.completions]
        return rollout


class First(Perturbed):
    """Takes the first two responses to each prompt."""

    def rollout(self, batch: PromptBatch) -> Rollout:
        rollout = super().rollout(batch)
        return rollout.select(rollout.sample < 2)


class Trims(Perturbed):
    """Changes every part that is sampled."""

    def generate(self, batch: PromptBatch) -> Rollout:
        rollout = super().generate(batch)
        rollout.completions = [text[:3] for text in rollout.completions]
        return rollout


class Adds(Perturbed):
    """Changes the scores."""

    def score(self, rollout: Rollout) -> tuple[Rollout, Scores]:
        rollout, scores = super().score(rollout)
        return rollout, Scores(scores.raw + 1, scores.kept)


class Asks(Perturbed):
    """Asks the rewards itself."""

    def score(self, rollout: Rollout) -> tuple[Rollout, Scores]:
        scores = self.rewards(rollout)
        self.seen.append((rollout, scores))
        return rollout, scores


@pytest.mark.parametrize("kind_of", [Shouts, First, Trims, Adds, Asks])
def test_a_subclass_may_override_a_step(
    kind_of: type[Perturbed], base: Pretrained, tmp_path: Path
) -> None:
    found = {}
    for chunks in (1, 2):
        rewards = {"kind": kind, "short": Counted()}
        found[chunks] = gradients(
            base,
            tmp_path,
            CLPCallback(alpha=FixedAlpha(0.3)),
            kind_of=kind_of,
            rewards=rewards,
            data={"batch_size": 4},
            trainer={"max_steps": 1, "max_epochs": -1},
            rollout_chunks=chunks,
        )
    (one, expected), (several, grads) = found[1], found[2]
    for (rollout, scores), (_, theirs) in zip(several.seen, one.seen, strict=True):
        assert scores.raw.equal(theirs.raw)
        own = torch.tensor([kind(rollout.completions), Counted()([], rollout.completions)])
        torch.testing.assert_close(scores.raw, own.T)
    for step in range(len(grads)):
        assert_same(grads[step], expected[step])


# -- mistakes ------------------------------------------------------------------------------------


def test_more_chunks_than_prompts_are_refused_before_anything_is_loaded(
    base: Pretrained, tmp_path: Path
) -> None:
    module = make_module(base, rollout_chunks=5, rollout_batches=2)
    trainer = make_trainer(tmp_path, accumulate_grad_batches=2)
    with pytest.raises(
        ValueError,
        match=r"rollout_chunks=5 is more than the 4 prompts .*\(batch_size 2 x rollout_batches 2\)",
    ):
        trainer.fit(module, make_data(tmp_path))
    assert not module.policy.is_built
