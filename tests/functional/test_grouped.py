"""A weight merged for every group of rows: values and gradients, whatever the shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clp_lightning.functional import grouped
from clp_lightning.functional.grouped import grouped_linear
from clp_lightning.functional.linear import _helps, _pays


def tensors(rows: tuple[int, ...], width: int, k: int, groups: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(*rows, width, generator=draw).requires_grad_()
    weight = torch.randn(24, width, generator=draw)
    deltas = [torch.randn(24, width, generator=draw).requires_grad_() for _ in range(k)]
    return [x, weight, torch.rand(groups, k, generator=draw), *deltas]


def exactly(x: Tensor, weight: Tensor, c: Tensor, *deltas: Tensor) -> Tensor:
    """Every row's own weight, in double precision."""
    rows = c.repeat_interleave(len(x) // len(c), 0)
    each = weight + torch.einsum("bk,koi->boi", rows, torch.stack(deltas))
    return torch.einsum("b...i,boi->b...o", x, each)


@pytest.mark.parametrize("block", [1, 200, 2**20])
@pytest.mark.parametrize(
    ("rows", "width", "k", "groups"),
    [((6, 5), 7, 3, 3), ((4,), 7, 1, 2), ((4, 2, 3), 5, 2, 4), ((8, 64), 512, 2, 4)],
)
def test_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch,
    block: int,
    rows: tuple[int, ...],
    width: int,
    k: int,
    groups: int,
) -> None:
    if width == 512 and block > 1:  # so that oneDNN multiplies, where it helps
        assert _pays(torch.zeros(8 * 64, width), torch.zeros(24, width), None) == _helps()
    monkeypatch.setattr(grouped, "_BLOCK", block)
    x, weight, c, *deltas = given = tensors(rows, width, k, groups)
    doubles = [t.detach().double().requires_grad_(t.requires_grad) for t in given]
    found, true = grouped_linear(x, weight, deltas, c), exactly(*doubles)
    up = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(found, [x, *deltas], up)
    truth = torch.autograd.grad(true, [doubles[0], *doubles[3:]], up.double())
    for mine, exact in zip([found, *ours], [true, *truth], strict=True):
        assert mine.shape == exact.shape
        torch.testing.assert_close(mine.double(), exact, atol=2e-5 * width**0.5, rtol=1e-5)


def test_a_bfloat16_weight_gets_its_deltas_with_one_rounding() -> None:
    x, weight, c, *deltas = tensors((6, 5), 7, 2, 3)
    half = weight.bfloat16()
    x16 = x.detach().bfloat16().requires_grad_()
    found = grouped_linear(x16, half, deltas, c)
    merged = half.float() + torch.einsum("gk,koi->goi", c, torch.stack(deltas).detach())
    exact = torch.einsum("gti,goi->gto", x16.float().view(3, 10, 7), merged.bfloat16().float())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float().view(3, 10, 24), exact, atol=0, rtol=2**-8)
    found.float().sum().backward()
    assert x16.grad is not None and x16.grad.dtype == torch.bfloat16
    assert all(d.grad is not None and d.grad.dtype == torch.float32 for d in deltas)


@pytest.mark.parametrize("block", [1, 2**20])
def test_half_precision_is_as_exact_in_many_blocks_as_in_one(
    monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(grouped, "_BLOCK", block)
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 16, generator=draw).bfloat16()
    delta, c = torch.zeros(256, 16), torch.ones(2, 1)
    x = torch.randn(4, 8, 16, generator=draw).bfloat16().requires_grad_()
    up = torch.randn(4, 8, 256, generator=draw).bfloat16()
    (found,) = torch.autograd.grad(grouped_linear(x, weight, [delta], c), x, up)
    exact = up.double() @ weight.double()
    # One rounding of each number is 2^-9 of it at most; of every block's sum 1.4e-2 in all.
    assert (found - exact).norm() < 3e-3 * exact.norm()


def test_double_precision_has_no_single_one_on_its_way() -> None:
    x, weight, c, *deltas = (t.detach().double() for t in tensors((6, 5), 7, 2, 3))
    for tensor in (x, *deltas):
        tensor.requires_grad_()
    up = torch.randn(6, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    # Coefficients stay in single precision, as a preference is.
    ours = torch.autograd.grad(grouped_linear(x, weight, deltas, c.float()), [x, *deltas], up)
    true = torch.autograd.grad(exactly(x, weight, c, *deltas), [x, *deltas], up)
    torch.testing.assert_close(ours, true, atol=1e-12, rtol=1e-12)


def test_autocast_multiplies_in_its_precision() -> None:
    x, weight, c, *deltas = tensors((6, 5), 7, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = grouped_linear(x, weight, deltas, c)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exactly(x, weight, c, *deltas), atol=0.1, rtol=0.05)
    found.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in (x, *deltas))


def test_what_is_frozen_gets_no_gradient() -> None:
    x, weight, c, *deltas = tensors((6, 5), 7, 2, 3)
    out = grouped_linear(x.detach(), weight, [deltas[0].detach(), deltas[1]], c)
    out.sum().backward()
    assert x.grad is None and deltas[0].grad is None and deltas[1].grad is not None
