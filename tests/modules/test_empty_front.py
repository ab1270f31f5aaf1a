"""A front of which every response was dropped says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clp_lightning.rewards import RewardError
from tests.runs import kind, make_data, make_module, make_trainer


@pytest.mark.filterwarnings("ignore:Reward 'down':UserWarning")
def test_a_front_of_nothing_names_the_reward(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    calls = []

    def down(completions: list[str], **_: Any) -> list[float]:
        calls.append(len(completions))
        if len(calls) > 1:  # behind the statistics
            raise ConnectionError("the service is down")
        return [float(i) for i in range(len(completions))]

    module = make_module(
        tiny_folder(),
        rewards={"kind": kind, "down": down},
        on_reward_error="drop",
        statistics_prompts=2,
    )
    trainer = make_trainer(tmp_path, limit_val_batches=None)
    missing = "no response of the reference. All were dropped.*'down' raised ConnectionError: the"
    with pytest.raises(RewardError, match=f"{missing} service is down.*reward_retries"):
        trainer.validate(module, make_data(tmp_path), verbose=False)
