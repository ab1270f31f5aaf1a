from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clp_lightning import Preference, PromptBatch, Sampling, TransformersEngine
from clp_lightning.policy.sampling import _possible, sample_tokens, truncate_logits
from tests.helpers import build_policy, prompt_batch
from tests.tiny import END, EOS, KINDS


# 0.999 quantile of chi-square with d degrees of freedom is about d + 3.1 sqrt(2 d) + 6.
def _chi_square_bound(degrees: int) -> float:
    return degrees + 3.1 * (2 * degrees) ** 0.5 + 6


@pytest.mark.parametrize("kind", KINDS)
def test_first_tokens_follow_the_softmax(tiny_folder: Callable[..., Path], kind: str) -> None:
    # A file that says top_k = 1 must change nothing.
    folder = tiny_folder(kind, generation={"top_k": 1, "do_sample": True})
    policy = build_policy(folder, perturb=0.05)
    preference = Preference.single([0.3, 0.7], 0.1)
    count = 4000
    batch = PromptBatch(["hello"], torch.tensor([7]), preference=preference)
    rollout = TransformersEngine().generate(policy, batch, count, Sampling(1))
    one = rollout.select(torch.tensor([0]))
    vocabulary = policy.model.config.vocab_size
    every = one.select(torch.zeros(vocabulary, dtype=torch.long))
    every.response_ids = torch.arange(vocabulary)[:, None]
    with torch.no_grad(), policy.conditioned(preference):
        expected = policy.logprobs(every)[:, 0].exp() * count
    seen = torch.bincount(rollout.response_ids[:, 0], minlength=vocabulary).float()
    common = expected >= 5
    cells = torch.stack([seen, expected])
    cells = torch.cat([cells[:, common], cells[:, ~common].sum(1, keepdim=True)], 1)
    cells = cells[:, cells[1] > 0]
    statistic = float(((cells[0] - cells[1]) ** 2 / cells[1]).sum())
    assert statistic < _chi_square_bound(cells.shape[1] - 1)


def test_unlikely_tokens_of_a_large_vocabulary_are_drawn() -> None:
    """Several of them together add less to a float32 sum than its rounding."""
    tail = 100_000
    probabilities = torch.full((1 + tail,), 1e-8, dtype=torch.float64)
    probabilities[0] = 1 - 1e-8 * tail
    # As many numbers as tokens, as far from each other.
    uniform = 0.9995 + 1e-8 * torch.arange(100, dtype=torch.float64)
    logits = probabilities.log().float().expand(len(uniform), -1)
    tokens, _ = sample_tokens(logits, uniform, Sampling())
    assert tokens.diff().tolist() == [1] * 99
    assert abs(tokens[0] - 50_000) < 20  # the likely token's probability is rounded, too
    kept = truncate_logits(logits[:1], top_p=0.9999, top_k=0).isfinite().sum()
    assert abs(kept - 90_001) < 20


@pytest.mark.parametrize(("prompts", "n"), [([], 2), (["a"], 0)])
def test_nothing_to_sample_is_refused(
    tiny_folder: Callable[..., Path], prompts: list[str], n: int
) -> None:
    policy = build_policy(tiny_folder())
    with pytest.raises(ValueError, match=f"{len(prompts)} prompts, {n} responses"):
        TransformersEngine().generate(policy, prompt_batch(prompts), n, Sampling(4))


def test_sampler_inverts_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    uniform = (torch.arange(1000) + 0.5) / 1000
    tokens, logp = sample_tokens(probabilities.log().expand(1000, 4), uniform, Sampling())
    assert torch.bincount(tokens).tolist() == [500, 0, 300, 200]
    torch.testing.assert_close(logp.exp(), probabilities[tokens])


def test_the_largest_uniform_never_takes_an_impossible_token() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    uniform = torch.tensor([1 - 2**-53], dtype=torch.float64)
    tokens, _ = sample_tokens(logits, uniform, Sampling())
    assert tokens.item() == 1


def test_the_smallest_uniform_never_takes_an_impossible_token() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0]])
    tokens, _ = sample_tokens(logits, torch.zeros(1), Sampling())
    assert tokens.item() == 1


def test_truncation() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert truncate_logits(logits, top_p=1.0, top_k=2).isfinite().tolist() == [
        [True, True, False, False]
    ]
    # 0.5 + 0.3 reaches 0.8; the smallest set with at least 0.7 is the first two.
    assert truncate_logits(logits, top_p=0.7, top_k=0).isfinite().tolist() == [
        [True, True, False, False]
    ]
    assert truncate_logits(logits, top_p=0.5, top_k=0).isfinite().sum() == 1


@pytest.mark.parametrize("off", [{"top_k": 3}, {"top_p": 0.9}, {"temperature": 0.0}])
def test_training_refuses_truncated_sampling(off: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="top_k"):
        Sampling(**off).check_on_policy()  # type: ignore[arg-type]


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="seed must be 0 or more; got -1"):
        Sampling(4, seed=-1)


def test_several_stop_ids_and_what_follows_them(tiny_folder: Callable[..., Path]) -> None:
    folder = tiny_folder("llama", chat=True)
    policy = build_policy(folder)
    assert set(policy.stop_ids) == {EOS, END}
    prompts = [[{"role": "user", "content": text}] for text in ("ab", "hello")]
    rollout = TransformersEngine().generate(policy, prompt_batch(prompts), 64, Sampling(24))
    stops = torch.isin(rollout.response_ids, torch.tensor([EOS, END]))
    ended = (stops & rollout.response_mask).any(1)
    assert ended.any() and not ended.all()
    assert torch.equal(rollout.truncated, ~ended)
    for ids, mask, end in zip(rollout.response_ids, rollout.response_mask, ended, strict=True):
        kept = ids[mask]
        inside = torch.isin(kept[:-1], torch.tensor([EOS, END]))
        assert not inside.any()
        if end:
            assert kept[-1].item() in (EOS, END)  # the stop token belongs to the response
        else:
            assert mask.all()


def test_a_row_depends_on_its_own_key_only(tiny_folder: Callable[..., Path]) -> None:
    policy = build_policy(tiny_folder("gpt2"), perturb=0.1)
    engine, sampling = TransformersEngine(), Sampling(8)
    batch = prompt_batch(["ab", "hello", "one more"])
    together = engine.generate(policy, batch, 4, sampling)
    alone = engine.generate(policy, batch.select([1]), 2, sampling)
    width = alone.response_ids.shape[1]
    rows = (together.prompt_ids == 1) & (together.sample < 2)
    got = together.response_ids[rows][:, :width]
    kept = alone.response_mask
    assert torch.equal(got[kept], alone.response_ids[kept])
    other = engine.generate(policy, batch, 4, Sampling(8, seed=1))
    shape = min(other.response_ids.shape[1], together.response_ids.shape[1])
    assert not torch.equal(other.response_ids[:, :shape], together.response_ids[:, :shape])


def test_weights_that_are_not_finite_show_in_the_log_probability() -> None:
    logits = torch.full((2, 4), torch.nan)
    tokens, logp = sample_tokens(logits, torch.tensor([0.0, 0.9]), Sampling())
    assert ((tokens >= 0) & (tokens < 4)).all()  # no index error before the loss is looked at
    assert logp.isnan().all()


def test_a_token_of_probability_0_is_not_kept() -> None:
    probabilities = torch.tensor([[0.3, 0.0, 0.7], [0.5, 0.2, 0.3]])
    tokens = torch.tensor([[1], [1]])
    assert _possible(tokens, probabilities).tolist() == [[2], [1]]
