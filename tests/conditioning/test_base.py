from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from clp_lightning import Coefficients, Gate, LoRA, Mixture, Preference, PromptText, Scaled, Weights


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Mixture, {"rest": "frozen"}, "rest must be 'train' or 'freeze'; got 'frozen'"),
        (Mixture, {"tied": "splt"}, "tied must be None, 'keep' or 'split'; got 'splt'"),
        (Mixture, {"targets": "fll"}, "Unknown preset 'fll': use one of full, "),
        (Weights, {"shared": "const"}, "shared must be 'scaled' or 'constant'; got 'const'"),
        (Gate, {"hidden": 0}, "hidden must be at least 1; got 0"),
        (PromptText, {"form": "words"}, "form must be 'number' or 'word'; got 'words'"),
        (LoRA, {"targets": "xyz"}, "Unknown preset 'xyz': use one of attention, "),
        (LoRA, {"shared_targets": "xyz"}, "Unknown preset 'xyz'"),
        (LoRA, {"scale": 0}, "scale must be above 0 and finite; got 0"),
        (LoRA, {"scale": float("nan")}, "scale must be above 0 and finite; got nan"),
        (LoRA, {"rank": -1}, "rank must be >= 1"),
        (LoRA, {"last_blocks": 0}, "last_blocks must be at least 1; got 0"),
    ],
)
def test_bad_arguments_are_refused(kind: type, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


class OneForAll(Coefficients):
    def copies(self, preference: Preference) -> Tensor:
        return 1 - preference.alpha.unsqueeze(-1)


def test_coefficients_of_the_wrong_shape_are_refused() -> None:
    preference = Preference(torch.full((3, 2), 0.5), torch.full((3,), 0.1))
    assert Scaled()(preference).shape == (3, 3)
    with pytest.raises(
        ValueError, match=r"OneForAll.copies returned shape \(3, 1\).* reward: \(3, 2\)"
    ):
        OneForAll()(preference)
