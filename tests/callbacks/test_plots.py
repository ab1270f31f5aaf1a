from __future__ import annotations

import pytest
import torch

from clp_lightning.callbacks.plots import plot_front
from clp_lightning.metrics import Front, Grid


def front(names: list[str], alphas: list[float]) -> dict[str, object]:
    grid = Grid(divisions=2, alphas=alphas).preferences(names)
    metric = Front(names, grid)
    point = torch.arange(-1, len(grid)).repeat(2)
    rewards = torch.randn(len(point), len(names))
    zero = torch.zeros(len(point))
    metric.update(
        point=point,
        prompt_ids=torch.arange(2).repeat_interleave(len(grid) + 1),
        sample=zero,
        rewards=rewards,
        normalized=rewards,
        log_ratio=zero,
        length=zero,
        truncated=zero,
    )
    return metric.compute().to_dict()


@pytest.mark.parametrize(
    ("k", "panels"), [(1, [("KL to the reference, nats per response", "a")]), (2, [("a", "b")])]
)
def test_panels(k: int, panels: list[tuple[str, str]]) -> None:
    figure = plot_front(front(["a", "b"][:k], [0.1, 0.5]))
    drawn = [ax for ax in figure.axes if ax.get_xlabel()]
    assert [(ax.get_xlabel(), ax.get_ylabel()) for ax in drawn] == panels
    labels = [text.get_text() for text in drawn[0].get_legend().get_texts()]
    assert labels == ["alpha 0.1", "alpha 0.5", "reference"]


def test_three_rewards_have_three_panels_with_all_points() -> None:
    found = front(["a", "b", "kl"], [0.1])
    figure = plot_front(found)
    drawn = [ax for ax in figure.axes if ax.get_xlabel()]
    assert [(ax.get_xlabel(), ax.get_ylabel()) for ax in drawn] == [
        ("a", "b"),
        ("a", "kl"),
        ("b", "kl"),
    ]
    offsets = torch.tensor(drawn[1].collections[0].get_offsets().tolist())
    points = found["points"]
    assert isinstance(points, list)
    want = torch.tensor([[p["rewards"]["a"], p["rewards"]["kl"]] for p in points])
    torch.testing.assert_close(offsets, want)
