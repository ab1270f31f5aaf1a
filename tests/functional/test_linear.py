"""The faster product is the product: values and gradients, whatever the shapes."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from clp_lightning.functional import linear
from clp_lightning.functional.linear import _helps, _is_exact, _onednn, _pays, _Product

OWN = sys.modules[_pays.__module__]


def tensors(rows: tuple[int, ...], bias: bool) -> list[Tensor | None]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(*rows, 64, generator=draw)
    weight = torch.randn(96, 64, generator=draw)
    return [
        x.requires_grad_(),
        weight.requires_grad_(),
        torch.randn(96, generator=draw).requires_grad_() if bias else None,
    ]


@pytest.fixture(params=sorted({False, _is_exact()}), ids=["torch's", "oneDNN's"][: 1 + _is_exact()])
def onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whose product is taken, whatever the processor; oneDNN's where it is as exact."""
    monkeypatch.setattr(OWN, "_helps", lambda: request.param)
    return bool(request.param)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(400,), (20, 20), (3,)])
@pytest.mark.parametrize("sliced", [True, False], ids=["sliced", "whole"])
def test_values_and_gradients(
    rows: tuple[int, ...], bias: bool, sliced: bool, onednn: bool
) -> None:
    x, weight, b = tensors(rows, bias)
    assert x is not None and weight is not None
    if sliced:
        x = torch.cat([x, x], dim=-2).detach()[..., : rows[-1], :].requires_grad_()
    assert _pays(x, weight, b) == (onednn and len(rows) * rows[0] > 3)
    found, plain = linear(x, weight, b), F.linear(x, weight, b)
    wanted = [t for t in (x, weight, b) if t is not None]
    exact = [t.detach().double().requires_grad_() for t in wanted]
    up = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1))
    ours = [found, *torch.autograd.grad(found, wanted, up)]
    torchs = [plain, *torch.autograd.grad(plain, wanted, up)]
    truth = F.linear(*exact)
    for our, their, true in zip(
        ours, torchs, [truth, *torch.autograd.grad(truth, exact, up.double())], strict=True
    ):
        assert our.shape == their.shape
        error = (their - true).abs().max()
        assert (our - true).abs().max() <= 2 * error + 1e-6  # in bfloat16: some 1e-1


def test_a_slice_does_not_copy_the_weight_for_every_row(onednn: bool) -> None:
    x, weight, _ = tensors((20, 40), False)
    assert x is not None and weight is not None
    called: list[str] = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            called.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Calls():
        linear(x.detach()[:, 20:], weight.detach())
    assert "mm" in called and "bmm" not in called


@pytest.mark.parametrize(
    ("processor", "mkl", "amx", "bf16", "helps"),
    [
        ("AMD EPYC 7B13", True, False, None, True),
        ("Intel Xeon", True, False, None, False),
        ("Intel Xeon", False, False, None, True),
        ("Intel Xeon", False, True, None, False),
        ("", False, False, False, True),  # ARM
        ("", False, False, True, False),
    ],
)
def test_whose_product_is_taken(
    processor: str,
    mkl: bool,
    amx: bool,
    bf16: bool | None,
    helps: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = {"cpu_name": processor} | ({} if bf16 is None else {"bf16": bf16})
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert _helps.__wrapped__() == helps


def test_a_frozen_weight_keeps_no_input() -> None:
    x, weight, _ = tensors((400,), False)
    assert x is not None and weight is not None
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _Product.apply(x, weight.detach(), None)
    assert [t.shape for t in saved] == [weight.shape]


def test_other_types_take_torch_s_way() -> None:
    x, weight, _ = tensors((400,), False)
    assert x is not None and weight is not None
    assert not _pays(x.double(), weight.double(), None)
    assert not _pays(x.bfloat16(), weight, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert not _pays(x, weight, None)
        assert linear(x, weight).dtype == torch.bfloat16


def test_two_threads_leave_the_switch_as_it_was() -> None:
    before = torch.get_float32_matmul_precision()
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with _onednn():
            inside.set()
            leave.wait(20)

    thread = threading.Thread(target=other)
    with _onednn():
        assert torch.get_float32_matmul_precision() == "medium" != before
        thread.start()
        inside.wait(0.2)  # it must not get in here, or it would take "medium" for what was before
    leave.set()
    thread.join(20)
    assert inside.is_set() and torch.get_float32_matmul_precision() == before


def test_precisions_that_were_set_in_the_new_way_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def mixed() -> str:
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(OWN, "_helps", lambda: True)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    x, weight = torch.randn(400, 64), torch.randn(96, 64)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
