"""What can be imported from the top level."""

from __future__ import annotations

import pytest

import clp_lightning


def test_every_name_can_be_imported() -> None:
    for name in clp_lightning.__all__:
        assert getattr(clp_lightning, name).__name__ == name


@pytest.mark.parametrize(
    "name",
    [
        "AlphaSampler",
        "Pattern",
        "RewardError",
        "TrainingDiverged",
        "WeightSampler",
        "completion_text",
    ],
)
def test_what_users_subclass_and_catch_is_there(name: str) -> None:
    assert name in dir(clp_lightning)


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Lora'"):
        _ = clp_lightning.Lora
