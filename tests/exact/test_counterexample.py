"""Worked out by hand: two steps, where mixing two optima is far from the optimum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clp_lightning.exact import exact_value, optimum
from clp_lightning.types import Preference

BETA = 0.1
ALPHA = BETA / (1 + BETA)  # V = (1 - alpha) (E[w.R] - beta KL)
# A0, A1, B0, B1 and two rewards, both 0.7 whatever follows B.
REWARDS = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.7, 0.7], [0.7, 0.7]]], dtype=torch.float64)
UNIFORM = torch.full((1, 4), 0.25, dtype=torch.float64).log()
W = torch.linspace(0, 1, 21, dtype=torch.float64)
GRID = Preference(torch.stack([W, 1 - W], dim=-1), torch.full((21,), ALPHA, dtype=torch.float64))


def objective(logp: Tensor) -> Tensor:
    """E[w.R] - beta KL at every w, for policies of shape (21, 4)."""
    return exact_value(logp[:, None], UNIFORM, REWARDS, GRID).squeeze(-1) / (1 - ALPHA)


def two_step(logits: Tensor) -> Tensor:
    """Log-probabilities of the four sequences from the logits of A, of 0 after A, of 0 after B."""
    yes, no = torch.nn.functional.logsigmoid(logits), torch.nn.functional.logsigmoid(-logits)
    return torch.stack(
        [
            yes[:, 0] + yes[:, 1],
            yes[:, 0] + no[:, 1],
            no[:, 0] + yes[:, 2],
            no[:, 0] + no[:, 2],
        ],
        dim=-1,
    )


def token_logits(logp: Tensor) -> Tensor:
    """The inverse of ``two_step``: (N, 4) to (N, 3)."""
    first = logp[:, :2].logsumexp(-1) - logp[:, 2:].logsumexp(-1)
    return torch.stack([first, logp[:, 0] - logp[:, 1], logp[:, 2] - logp[:, 3]], dim=-1)


def train(features: Tensor) -> Tensor:
    """The best objective of logits that are linear in ``features``, shape (21, F)."""
    coefficients = torch.zeros(features.shape[1], 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([coefficients], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -objective(two_step(features @ coefficients)).mean()
        value.backward()
        return value

    optimizer.step(loss)
    return objective(two_step(features @ coefficients)).detach()


@pytest.mark.parametrize(
    ("policy", "mean", "centre"),
    [
        ("optimum", 0.7224, 0.643),
        ("mixed logits of the two optima", 0.6618, 0.479),
        ("linear in w, trained", 0.7004, 0.600),
        ("with a w(1-w) term", 0.7219, None),
    ],
)
def test_numbers(policy: str, mean: float, centre: float | None) -> None:
    best = optimum(UNIFORM, REWARDS, GRID)[1].squeeze(1)
    one = torch.ones_like(W)
    if policy == "optimum":
        values = objective(best)
    elif policy == "mixed logits of the two optima":
        corners = token_logits(best[[-1, 0]])
        values = objective(two_step(GRID.weights @ corners))
    elif policy == "linear in w, trained":
        values = train(torch.stack([one, W], dim=-1))
    else:
        values = train(torch.stack([one, W, W * (1 - W)], dim=-1))
    assert values.mean().item() == pytest.approx(mean, abs=1e-3)
    if centre is not None:
        assert values[10].item() == pytest.approx(centre, abs=1e-3)
