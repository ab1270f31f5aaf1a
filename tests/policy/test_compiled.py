"""Compiled decoding beside the model's own forward: the same tokens, and nothing compiled twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from clp_lightning import (
    MOD,
    LoRA,
    Mixture,
    Policy,
    Preference,
    PromptText,
    Rollout,
    Sampling,
    SoftPrompt,
    TransformersEngine,
)
from clp_lightning.conditioning import Conditioner, Unconditioned
from clp_lightning.policy import rollout as rollout_module
from clp_lightning.policy import steps as steps_module
from clp_lightning.policy.steps import CompiledSteps, compile_forward
from tests.helpers import PROMPTS, build_policy, prompt_batch

SAMPLINGS = [Sampling(20, temperature=0), Sampling(20, seed=3)]
CONDITIONERS: dict[str, Callable[[], Conditioner]] = {
    "full": lambda: Mixture("full"),  # mixes rows
    "merge": lambda: Mixture("full", mixing="merge"),
    "attention": lambda: Mixture("attention", rest="freeze"),
    "LoRA": lambda: LoRA(rank=2, shared_rank=2),
    "prompt": lambda: PromptText(),
    "soft prompt": lambda: SoftPrompt(),
}


Make = Callable[..., TransformersEngine]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes engines that trace and guard only, which is where programs differ."""
    torch._dynamo.reset()
    quick = partial(compile_forward, backend="eager")
    monkeypatch.setattr(rollout_module, "compile_forward", quick)

    def make(kind: type[TransformersEngine] = TransformersEngine) -> TransformersEngine:
        return kind(compile=True)

    return make


def generate(engine: TransformersEngine, policy: Policy, sampling: Sampling) -> Rollout:
    return engine.generate(policy, prompt_batch(PROMPTS), 2, sampling)


def assert_same(got: Rollout, expected: Rollout) -> None:
    assert torch.equal(got.response_ids, expected.response_ids)
    assert torch.equal(got.response_mask, expected.response_mask)
    assert torch.equal(got.truncated, expected.truncated)
    torch.testing.assert_close(got.logp, expected.logp, atol=1e-4, rtol=0)


def assert_as_without(
    engine: TransformersEngine, policy: Policy, plain: TransformersEngine | None = None
) -> None:
    for sampling in SAMPLINGS:
        expected = generate(plain or TransformersEngine(), policy, sampling)
        assert_same(generate(engine, policy, sampling), expected)


@pytest.mark.parametrize("conditioner", CONDITIONERS)
def test_tokens_are_those_of_the_plain_forward(
    tiny_folder: Callable[..., Path], compiled: Make, conditioner: str
) -> None:
    policy = build_policy(tiny_folder("llama"), CONDITIONERS[conditioner](), perturb=0.05)
    policy.stop_ids = ()  # of rows that end there is another test
    assert_as_without(compiled(), policy)


def test_the_reference_and_the_policy_by_one_engine(
    tiny_folder: Callable[..., Path], compiled: Make
) -> None:
    policy = build_policy(tiny_folder("llama"), Mixture("full"), perturb=0.05)
    engine = compiled()
    assert_as_without(engine, policy)
    with policy.reference():
        assert_as_without(engine, policy)


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_other_families(tiny_folder: Callable[..., Path], compiled: Make, kind: str) -> None:
    policy = build_policy(tiny_folder(kind), Mixture("full"), perturb=0.05)
    assert_as_without(compiled(), policy)


def test_a_mixture_of_policies(tiny_folder: Callable[..., Path], compiled: Make) -> None:
    policy = build_policy(tiny_folder("llama"), Mixture("full"), perturb=0.05)
    assert_as_without(compiled(MOD), policy, MOD())


def test_in_half_precision(tiny_folder: Callable[..., Path], compiled: Make) -> None:
    policy = build_policy(tiny_folder(), CONDITIONERS["LoRA"](), perturb=0.05)
    engine = compiled()
    engine.precision = "bf16"
    greedy = SAMPLINGS[0]
    expected = generate(TransformersEngine(precision="bf16"), policy, greedy)
    assert_same(generate(engine, policy, greedy), expected)


def test_a_policy_without_conditioning(tiny_folder: Callable[..., Path], compiled: Make) -> None:
    policy = build_policy(tiny_folder("llama"), Unconditioned())
    assert_as_without(compiled(), policy)


@pytest.mark.parametrize("conditioner", CONDITIONERS)
def test_no_preference_prompt_or_step_compiles_anew(
    tiny_folder: Callable[..., Path], compiled: Make, conditioner: str
) -> None:
    policy = build_policy(tiny_folder("llama"), CONDITIONERS[conditioner](), perturb=0.05)
    policy.stop_ids = ()  # no row ends, so none is left out
    engine = compiled()
    asked = prompt_batch(PROMPTS)
    engine.generate(policy, asked, 2, Sampling(12))
    weights = torch.tensor([[1.0, 0.0], [0.2, 0.8], [0.6, 0.4]])
    others = Preference(weights, torch.tensor([0.0, 0.3, 0.9]))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number, prompts in enumerate(
            [PROMPTS, ["other", "words", "a long one after those"]], start=1
        ):
            batch = replace(prompt_batch(prompts), preference=others, epoch=number)
            engine.generate(policy, batch, 2, Sampling(12, seed=number))
        for parameter in policy.trained_parameters().values():
            parameter.data.add_(0.01)  # a step of the optimizer
        engine.generate(policy, asked, 2, Sampling(12))


@pytest.mark.parametrize("conditioner", ["merge"])
def test_the_second_size_makes_a_program_for_all(
    tiny_folder: Callable[..., Path], compiled: Make, conditioner: str
) -> None:
    policy = build_policy(tiny_folder("llama"), CONDITIONERS[conditioner](), perturb=0.05)
    policy.stop_ids = ()
    engine = compiled()
    for n in (2, 3):
        engine.generate(policy, prompt_batch(PROMPTS), n, Sampling(12))
    for n in (6, 7):
        with torch._dynamo.config.patch(error_on_recompile=True):
            got = engine.generate(policy, prompt_batch(PROMPTS), n, Sampling(12))
        plain = TransformersEngine().generate(policy, prompt_batch(PROMPTS), n, Sampling(12))
        assert_same(got, plain)


def test_more_sizes_than_there_may_be_programs(
    tiny_folder: Callable[..., Path], compiled: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps_module, "_PROGRAMS", 2)
    steps_module.warn_once.cache_clear()
    policy = build_policy(tiny_folder("llama"), Mixture("full"), perturb=0.05)
    policy.stop_ids = ()
    engine = compiled()

    def all_sizes() -> None:
        for n in (1, 2, 3, 4, 5):
            got = engine.generate(policy, prompt_batch(PROMPTS), n, Sampling(6))
            plain = TransformersEngine().generate(policy, prompt_batch(PROMPTS), n, Sampling(6))
            assert_same(got, plain)

    asked: list[int] = []
    limit = torch._dynamo.exc.FailOnRecompileLimitHit
    raised = limit.__init__
    monkeypatch.setattr(limit, "__init__", lambda *a: asked.append(1) or raised(*a))
    with pytest.warns(UserWarning, match="compiled for 2 sizes; others are computed without"):
        all_sizes()
    assert 0 < len(asked) <= 8  # of 4 sizes, and not at every token


def test_rows_that_ended_are_left_out_by_halves() -> None:
    steps = CompiledSteps(8, None, lambda *_, **__: torch.empty(0))
    ended = torch.tensor([True, False, True, True, True, False, True, True])
    kept = steps.kept(ended)
    assert kept is not None and kept.tolist() == [1, 5]
    ended[7] = False  # three are left: half of eight, one of them done
    kept = steps.kept(ended)
    assert kept is not None and kept.tolist() == [0, 1, 5, 7]
    assert steps.kept(torch.tensor([True, False, False])) is None


def test_responses_that_end_early(tiny_folder: Callable[..., Path], compiled: Make) -> None:
    policy = build_policy(tiny_folder("llama"), Mixture("full"), perturb=0.05)
    policy.stop_ids = tuple(range(5, 18))  # any of many tokens, so that rows end one by one
    engine = compiled()
    sampling = Sampling(20, seed=1)
    batch = prompt_batch(PROMPTS)
    expected = TransformersEngine().generate(policy, batch, 4, sampling)
    assert len(set(expected.lengths.tolist())) > 4
    assert_same(engine.generate(policy, batch, 4, sampling), expected)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("t5", "encoder-decoder"),
        ("gemma3", "DynamicSlidingWindowLayer"),
        ("lfm2", "LinearAttentionLayer"),
    ],
)
def test_what_cannot_be_compiled_is_refused(
    tiny_folder: Callable[..., Path], compiled: Make, kind: str, why: str
) -> None:
    policy = build_policy(tiny_folder(kind), LoRA(rank=2))
    with pytest.raises(ValueError, match=rf"{why}.*compile=False"):
        generate(compiled(), policy, Sampling(4))


def test_a_forward_that_cannot_be_traced_is_an_error_that_helps(
    tiny_folder: Callable[..., Path], compiled: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = build_policy(tiny_folder("llama"), Mixture("full"))
    norm: Any = policy.model.get_submodule("model.norm")

    def opaque(states: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return type(norm).forward(norm, states)

    monkeypatch.setattr(norm, "forward", opaque)
    with policy.reference(), pytest.raises(RuntimeError, match="compile=False"):
        generate(compiled(), policy, Sampling(4))


@pytest.mark.slow
@pytest.mark.parametrize("conditioner", ["full", "merge", "LoRA"])
def test_generated_code_gives_the_same_tokens(
    tiny_folder: Callable[..., Path], conditioner: str
) -> None:
    policy = build_policy(tiny_folder("llama"), CONDITIONERS[conditioner](), perturb=0.05)
    assert_as_without(TransformersEngine(compile=True), policy)
