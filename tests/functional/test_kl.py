from __future__ import annotations

import math

import torch

from clp_lightning.functional import k3, kl_to_go, log_ratio


def test_kl_to_go_by_hand() -> None:
    ratio = torch.tensor([[1.0, 2.0, 4.0], [0.5, math.nan, -math.inf]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    want = torch.tensor([[7.0, 6.0, 4.0], [0.5, 0.0, 0.0]])
    torch.testing.assert_close(kl_to_go(ratio, mask), want)


def test_mean_log_ratio_is_the_kl_and_so_is_mean_k3() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    kl = torch.distributions.kl_divergence(
        torch.distributions.Categorical(p), torch.distributions.Categorical(q)
    )
    ratio = log_ratio(p.log(), q.log())
    torch.testing.assert_close((p * ratio).sum(), kl)
    torch.testing.assert_close((p * k3(ratio)).sum(), kl)
    assert (k3(ratio) >= 0).all() and (ratio < 0).any()
