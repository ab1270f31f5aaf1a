from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon

from clp_lightning import MuonAdamW
from clp_lightning.modules.optimizers import fuse_on_cpu


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 7), nn.LayerNorm(7), nn.Linear(7, 2))


def backward(model: nn.Module, step: int) -> None:
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(5, (8,), generator=draw)
    model.zero_grad()
    model(ids).square().sum().backward()


def assert_equal(left: nn.Module, right: nn.Module) -> None:
    for (name, a), b in zip(left.named_parameters(), right.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_it_is_muon_for_matrices_and_adamw_for_the_rest() -> None:
    model, twin = network(), network()
    optimizer = MuonAdamW(model.parameters(), lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)
    matrices = [p for p in twin.parameters() if p.ndim == 2]
    others = [p for p in twin.parameters() if p.ndim == 1]
    assert len(matrices) == 3 and len(others) == 4
    parts = [
        Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        AdamW(others, lr=0.01, betas=(0.8, 0.9), weight_decay=0.1),
    ]
    for step in range(3):
        backward(model, step)
        optimizer.step()
        backward(twin, step)
        for part in parts:
            part.step()
    assert_equal(model, twin)
    for moved, start in zip(model.parameters(), network().parameters(), strict=True):
        assert not torch.equal(moved, start)


def test_groups_keep_their_learning_rate_and_schedules_reach_every_parameter() -> None:
    model = network()
    first, *others = model.parameters()
    groups = [{"params": [first], "lr": 0.0}, {"params": others, "lr": 0.5, "name": "rest"}]
    optimizer = MuonAdamW(groups, lr=1.0)
    assert sorted(g["lr"] for g in optimizer.param_groups) == [0.0, 0.5, 0.5]
    assert [g.get("name") for g in optimizer.param_groups] == [None, "rest", "rest"]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    backward(model, 0)
    optimizer.step()
    schedule.step()
    before = copy.deepcopy(model)
    start = network()
    assert torch.equal(first, next(start.parameters()))
    assert not torch.equal(others[0], [*start.parameters()][1])
    backward(model, 1)
    optimizer.step()
    assert_equal(model, before)


def test_a_restored_optimizer_goes_on_as_the_saved_one() -> None:
    model = network()
    optimizer = MuonAdamW(model.parameters(), lr=0.01)
    for step in range(2):
        backward(model, step)
        optimizer.step()
    other = copy.deepcopy(model)
    restored = MuonAdamW(other.parameters(), lr=1.0)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(2, 4):
        for each, its in ((model, optimizer), (other, restored)):
            backward(each, step)
            its.step()
    assert_equal(model, other)


def test_a_parameter_without_gradient_stays_and_has_no_momentum() -> None:
    model = network()
    optimizer = MuonAdamW(model.parameters(), lr=0.1)
    backward(model, 0)
    idle: list[Tensor] = [*model[1].parameters()]
    for parameter in idle:
        parameter.grad = None
    before = [p.clone() for p in idle]
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(idle, before, strict=True))
    assert not any(p in optimizer.state for p in idle)
    assert model[0].weight in optimizer.state


@pytest.mark.parametrize("chosen", [1, 2])
def test_parameters_of_one_kind_only(chosen: int) -> None:
    model = network()
    optimizer = MuonAdamW([p for p in model.parameters() if p.ndim == chosen], lr=0.1)
    backward(model, 0)
    optimizer.step()
    for moved, start in zip(model.parameters(), network().parameters(), strict=True):
        assert torch.equal(moved, start) == (moved.ndim != chosen)


def test_what_it_would_ignore_is_refused() -> None:
    optimizer = MuonAdamW(network().parameters())
    with pytest.raises(NotImplementedError, match="at the start"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(ValueError, match="[Ll]earning rate"):
        MuonAdamW(network().parameters(), lr=-1.0)


def test_adamw_is_fused_where_the_choice_was_open() -> None:
    ours, torchs = network(), network()
    fused = fuse_on_cpu(AdamW(ours.parameters(), lr=0.1))
    plain = AdamW(torchs.parameters(), lr=0.1)
    for step in range(3):
        for model, optimizer in ((ours, fused), (torchs, plain)):
            backward(model, step)
            optimizer.step()
    assert fused.param_groups[0]["fused"] and not plain.param_groups[0]["fused"]
    for mine, theirs in zip(ours.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    # What Lightning reads as "unscales gradients itself", whereupon it refuses to clip.
    assert not getattr(fused, "_step_supports_amp_scaling", False)
    chosen = fuse_on_cpu(AdamW(network().parameters(), foreach=True))
    assert not chosen.param_groups[0]["fused"]
    gaps = fuse_on_cpu(AdamW([nn.Parameter(torch.zeros(6, 8)[:, :4])]))
    assert not gaps.param_groups[0]["fused"]
