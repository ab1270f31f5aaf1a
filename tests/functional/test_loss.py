from __future__ import annotations

import math

import torch

from clp_lightning.functional import policy_gradient_loss

MASK = torch.tensor([[True, True, True], [True, False, False]])


def test_loss_and_gradient_by_hand() -> None:
    logp = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]], requires_grad=True)
    advantage = torch.tensor([[1.0, 0.5, 2.0], [-1.0, 9.0, 9.0]])
    loss = policy_gradient_loss(logp, advantage, MASK, num_responses=4)
    # -(-1 - 1 - 6 + 4) / 4
    torch.testing.assert_close(loss, torch.tensor(1.0))
    loss.backward()
    want = -torch.tensor([[1.0, 0.5, 2.0], [-1.0, 0.0, 0.0]]) / 4
    torch.testing.assert_close(logp.grad, want)


def test_padding_cannot_poison() -> None:
    logp = torch.tensor([[-1.0, -1.0, -1.0], [-1.0, -math.inf, math.nan]], requires_grad=True)
    advantage = torch.tensor([[1.0, 1.0, 1.0], [1.0, math.nan, math.inf]])
    loss = policy_gradient_loss(logp, advantage, MASK, num_responses=2)
    assert loss == 2
    loss.backward()
    assert logp.grad is not None
    torch.testing.assert_close(logp.grad, -MASK.float() / 2)
