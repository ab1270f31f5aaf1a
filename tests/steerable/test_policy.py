from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clp_lightning import (
    MOD,
    LoRA,
    Mixture,
    Preference,
    PromptText,
    SoftPrompt,
    SteerablePolicy,
)
from clp_lightning.conditioning import Conditioner
from clp_lightning.functional.logprobs import token_logprobs
from clp_lightning.policy.readout import Readout
from clp_lightning.policy.scoring import score_full
from tests.helpers import NAMES
from tests.steerables import WEIGHTS, make_steerable

PROMPTS = ["tea", "a long walk", "fog?", "ink and owls", "x", "jam", "the sun", "zip zip"]
GRID = [
    {NAMES[0]: share, NAMES[1]: 1 - share} for share in (0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 0.9, 1)
]
ALPHAS = [0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0]
NEAR_TIE = 1e-4


@pytest.mark.parametrize(
    ("kind", "conditioner"),
    [
        ("llama", LoRA(rank=2, shared_rank=2)),
        ("gpt2", Mixture("attention")),
        ("llama", Mixture("full")),
        ("t5", Mixture("full")),  # its position table has no row axis: one preference at a time
        ("t5_v1_1", LoRA(rank=2, shared_rank=2)),
        ("gpt2", Mixture("logits")),
        ("llama", SoftPrompt()),
        ("llama", PromptText()),
    ],
    ids=["lora", "attention", "full", "t5-full", "t5_v1_1-lora", "logits", "soft", "text"],
)
def test_eight_preferences_in_a_batch_are_eight_single_answers(
    kind: str, conditioner: Conditioner, tiny_folder: Callable[..., Path]
) -> None:
    steerable = make_steerable(tiny_folder(kind), conditioner)
    together = steerable.generate(PROMPTS, GRID, ALPHAS, temperature=0, max_new_tokens=12)
    near_ties = 0
    for row, prompt in enumerate(PROMPTS):
        alone = steerable.generate(
            [prompt], GRID[row], ALPHAS[row], temperature=0, max_new_tokens=12
        )
        mine = together.response_ids[row, together.response_mask[row]].tolist()
        if mine == alone.response_ids[0, alone.response_mask[0]].tolist():
            continue
        near_ties += 1
        assert _smallest_lead(steerable, alone) < NEAR_TIE
    assert near_ties <= 1
    assert len(set(together.completions)) > 4


def _smallest_lead(steerable: SteerablePolicy, rollout: object) -> float:
    """How far the best logit of any step is above the second best."""
    policy, leads = steerable.policy, []

    def observe(module: object, args: object, out: object) -> None:
        best = out.logits.float().topk(2, -1).values  # type: ignore[attr-defined]
        leads.append(float((best[..., 0] - best[..., 1]).min()))

    hook = policy.model.register_forward_hook(observe)
    with torch.no_grad(), policy.conditioned(rollout.preference):  # type: ignore[attr-defined]
        score_full(
            policy.model,
            rollout.input_ids,  # type: ignore[attr-defined]
            rollout.prompt_mask,  # type: ignore[attr-defined]
            rollout.response_ids,  # type: ignore[attr-defined]
            torch.zeros(1, dtype=torch.long),
            policy.rows,
            Readout(token_logprobs),
        )
    hook.remove()
    return min(leads)


def test_the_dial_moves_the_answers(tiny_folder: Callable[..., Path]) -> None:
    steerable = make_steerable(tiny_folder())
    answers = [
        steerable.generate(PROMPTS, weights, 0.0, temperature=0).completions
        for weights in (GRID[0], GRID[-1])
    ]
    assert answers[0] != answers[1]
    plain = steerable.generate(PROMPTS, GRID[0], 1.0, temperature=0)
    with steerable.policy.reference():
        ref = steerable.engine.generate(
            steerable.policy,
            steerable.batch(PROMPTS, plain.preference),
            1,
            _greedy(),
        )
    assert plain.completions == ref.completions


def _greedy() -> object:
    from clp_lightning import Sampling

    return Sampling(8, temperature=0)


def test_draws_depend_on_the_prompt_not_on_the_batch(tiny_folder: Callable[..., Path]) -> None:
    steerable = make_steerable(tiny_folder())
    together = steerable.generate(PROMPTS, WEIGHTS, 0.1, n=2)
    alone = steerable.generate(PROMPTS[3:4], WEIGHTS, 0.1, n=2)
    assert together.completions[6:8] == alone.completions
    assert alone.completions[0] != alone.completions[1]
    again = steerable.generate(PROMPTS[3:4], WEIGHTS, 0.1, n=2, seed=1)
    assert again.completions != alone.completions


def test_log_probabilities_are_those_of_the_sampler(tiny_folder: Callable[..., Path]) -> None:
    steerable = make_steerable(tiny_folder())
    rollout = steerable.generate(PROMPTS, GRID, ALPHAS)
    mask = rollout.response_mask
    logp = steerable.logprobs(rollout)
    assert not logp.requires_grad
    torch.testing.assert_close(logp[mask], rollout.logp[mask])
    ref = steerable.reference_logprobs(rollout)
    torch.testing.assert_close(logp[-1][mask[-1]], ref[-1][mask[-1]])  # alpha = 1
    assert (logp[0] - ref[0])[mask[0]].abs().max() > 1e-2


@pytest.mark.parametrize(
    ("kind", "conditioner"), [("llama", LoRA(rank=2, shared_rank=2)), ("t5", Mixture("full"))]
)
def test_text_is_told_as_it_comes(
    kind: str, conditioner: Conditioner, tiny_folder: Callable[..., Path]
) -> None:
    steerable = make_steerable(tiny_folder(kind), conditioner)
    heard = dict.fromkeys(range(len(PROMPTS) * 2), "")
    pieces = 0

    def hear(row: int, text: str) -> None:
        nonlocal pieces
        heard[row] += text
        pieces += 1

    rollout = steerable.generate(PROMPTS, GRID, ALPHAS, n=2, on_text=hear)
    assert list(heard.values()) == rollout.completions
    assert pieces > len(heard)
    assert steerable.engine.on_tokens is None  # type: ignore[attr-defined]


def test_text_that_a_tokenizer_takes_back_is_told_late(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_folder(), base)
    config = json.loads((base / "tokenizer_config.json").read_text())
    config["clean_up_tokenization_spaces"] = True  # " ." is then decoded as "."
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    steerable = make_steerable(base)
    heard: dict[int, list[str]] = defaultdict(list)
    rollout = steerable.generate(
        PROMPTS,
        WEIGHTS,
        0.5,
        n=64,
        max_new_tokens=40,
        temperature=2.0,
        on_text=lambda row, text: heard[row].append(text),
    )
    assert ["".join(heard[row]) for row in range(len(rollout))] == rollout.completions
    plain = steerable.policy.tokenizer.decode(
        rollout.response_ids.flatten(), clean_up_tokenization_spaces=False
    )
    assert any(taken in plain for taken in (" .", " ,", " ?", " !", " 's", " ' "))


def test_another_engine_answers_for_the_same_dial(tiny_folder: Callable[..., Path]) -> None:
    steerable = make_steerable(tiny_folder())
    corner = steerable.generate(PROMPTS, GRID[-1], 0.1, temperature=0)
    steerable.engine = MOD()
    assert steerable.generate(PROMPTS, GRID[-1], 0.1, temperature=0).completions == (
        corner.completions
    )
    rollout = steerable.generate(PROMPTS, WEIGHTS, 0.1)
    mask, own = rollout.response_mask, rollout.logp
    assert own is not None
    mixture = steerable.logprobs(rollout)
    torch.testing.assert_close(mixture[mask], own[mask], atol=1e-4, rtol=0)
    with torch.no_grad(), steerable.policy.conditioned(rollout.preference):
        conditioned = steerable.policy.logprobs(rollout)
    assert (conditioned - mixture)[mask].abs().max() > 1e-3


def test_preferences_are_given_by_name(tiny_folder: Callable[..., Path]) -> None:
    steerable = make_steerable(tiny_folder())
    given = steerable.preference({NAMES[1]: 0.25, NAMES[0]: 0.75}, [0.1, 0.2], rows=2)
    expected = Preference(torch.tensor([[0.75, 0.25]] * 2), torch.tensor([0.1, 0.2]))
    assert torch.equal(given.weights, expected.weights)
    assert torch.equal(given.alpha, expected.alpha)
    wrong: list[tuple[object, object, str]] = [
        ({"kind": 1.0}, 0.1, "No weight for reward 'short'"),
        ({"kind": 0.5, "short": 0.5, "tall": 0.0}, 0.1, "unknown reward 'tall'"),
        ({"kind": 0.5, "short": 0.4}, 0.1, "must sum to 1"),
        (WEIGHTS, 1.5, "alpha, the KL strength"),
        ([WEIGHTS] * 3, 0.1, "weights has 3 entries for 2 prompts"),
        (WEIGHTS, [0.1], "alpha has 1 entries for 2 prompts"),
        (WEIGHTS, "0.1", r"must be a number in \[0, 1\], got '0.1'"),
    ]
    for weights, alpha, message in wrong:
        with pytest.raises(ValueError, match=message):
            steerable.generate(["a", "b"], weights, alpha)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n, the responses per prompt, must be at least 1"):
        steerable.generate(["a"], WEIGHTS, 0.1, n=0)


@pytest.mark.parametrize("prompts", ["tea", [], [{"role": "user", "content": "tea"}]])
def test_a_single_prompt_stands_in_a_list(
    prompts: object, tiny_folder: Callable[..., Path]
) -> None:
    with pytest.raises(ValueError, match=r"put a single one into \[ \]"):
        make_steerable(tiny_folder()).generate(prompts, WEIGHTS, 0.1)  # type: ignore[arg-type]
