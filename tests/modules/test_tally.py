from __future__ import annotations

import torch

from clp_lightning.functional import leave_one_out
from clp_lightning.modules.tally import _without_spread

nan = float("nan")


def test_only_groups_that_can_be_compared_are_without_spread() -> None:
    # Alike; told apart; one that is scored beside one that is not; alone; two, neither scored.
    scores = torch.tensor([1.0, 1.0, 1.0, 2.0, 3.0, nan, 4.0, nan, nan])
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 3, 4, 4])
    centred = leave_one_out(scores, groups=groups)
    found = _without_spread(centred, groups, ~scores.isnan())
    assert found.tolist() == [1.0, 0.0]
    assert _without_spread(centred[:0], groups[:0], scores[:0].isnan()).tolist() == []
