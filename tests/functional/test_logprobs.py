"""Log-probabilities of tokens beside torch's own operations, and their gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clp_lightning.functional import logprobs, token_logprobs


def plain(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    every = (logits.float() if logits.dtype.itemsize < 4 else logits) / temperature
    return every.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("at_once", [1, 100, 2**19])
def test_values_and_gradients_are_those_of_log_softmax(
    dtype: torch.dtype, temperature: float, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "_AT_ONCE", at_once)
    draw = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(3, 4, 11, generator=draw)).to(dtype)
    logits[0, 0, 3] = -torch.inf  # a token that cannot come
    tokens = torch.randint(4, 11, (3, 4), generator=draw)
    upstream = torch.randn(3, 4, generator=draw)
    gradients = []
    for of in (token_logprobs, plain):
        given = logits.clone().requires_grad_()
        found = of(given, tokens, temperature)
        (found * upstream).sum().backward()
        assert given.grad is not None
        gradients.append((found.detach(), given.grad))
    for mine, theirs in zip(*gradients, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("at_once", [1, 2**19])
def test_gradients_by_differences(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "_AT_ONCE", at_once)
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(5, (2, 3))
    assert torch.autograd.gradcheck(lambda z: token_logprobs(z, tokens, 1.3), logits)
    assert torch.autograd.gradgradcheck(lambda z: token_logprobs(z, tokens, 1.3), logits)


def test_of_one_position_and_more_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "_AT_ONCE", 1)
    for shape in [(5,), (2, 5), (2, 3, 4, 5)]:
        logits, tokens = torch.randn(shape), torch.randint(5, shape[:-1])
        torch.testing.assert_close(token_logprobs(logits, tokens), plain(logits, tokens))


def test_of_no_row() -> None:
    assert token_logprobs(torch.zeros(0, 2, 5), torch.zeros(0, 2).long()).shape == (0, 2)


def test_what_is_not_finite_stays_so() -> None:
    logits = torch.zeros(1, 1, 3)
    logits[0, 0, 1] = torch.nan
    assert token_logprobs(logits, torch.zeros(1, 1).long()).isnan().all()
