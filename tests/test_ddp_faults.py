"""A reward that fails on one process ends all of them, with one message."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clp_lightning.__main__ import run
from clp_lightning.rewards import Reward
from tests.processes import statuses_of_two
from tests.runs import run_config, write_config


class FailsOnOne(Reward):
    """Fails on the second process, from its call number ``after`` on.

    Args:
        how: In which way.
        after: How often it works before.
    """

    def __init__(self, how: str, after: int) -> None:
        self.how, self.after = how, after
        self.calls = 0

    def __call__(self, prompts: Any, completions: list[str], **columns: Any) -> list[float]:
        self.calls += 1
        if os.environ.get("LOCAL_RANK") == "1" and self.calls > self.after:
            match self.how:
                case "raises":
                    raise ConnectionError("nobody there")
                case "hangs":
                    time.sleep(1000)
            return [math.nan] * len(completions)
        return [float(len(text) % 3) for text in completions]


# Two calls on each process for the statistics, two for the first step, and then a front.
@pytest.mark.parametrize(
    ("how", "after", "chunks", "message"),
    [
        ("raises", 0, 1, "raised ConnectionError: nobody there"),
        ("hangs", 2, 1, "did not answer within 2 s"),
        ("returns NaN", 2, 1, "returned nan"),
        ("raises", 4, 1, "raised ConnectionError: nobody there"),
        ("raises", 3, 2, "raised ConnectionError: nobody there"),  # the second half of a batch
    ],
    ids=["statistics", "training, hangs", "training, NaN", "front", "chunk"],
)
def test_a_reward_that_fails_on_one_process_ends_both(
    how: str,
    after: int,
    chunks: int,
    message: str,
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    config = run_config(tmp_path, tiny_folder(), max_steps=4, val_check_interval=2)
    config["model"]["init_args"] |= {
        "rewards": {
            "kind": "tests.runs.kind",
            "failing": {
                "class_path": "tests.test_ddp_faults.FailsOnOne",
                "init_args": {"how": how, "after": after},
            },
        },
        "reward_timeout": 2.0,
        "rollout_chunks": chunks,
    }
    path = write_config(tmp_path / "config.yaml", config)
    # 30 s for the end; on a busy machine the start takes as long.
    statuses = statuses_of_two(run, ["fit", "--config", path], 60, tmp_path)
    assert statuses == [2, 2]
    texts = [(tmp_path / f"output-{rank}").read_text() for rank in range(2)]
    assert texts[0].count(f"Reward 'failing' {message}") == 1
    (line,) = (line for line in texts[0].splitlines() if "error:" in line)
    assert "On rank 1." in line and "Prompt: '" in line and "Completion: '" in line
    assert "Reward 'failing'" not in texts[1]
    assert texts[1].count("A reward failed on rank 1; rank 0 says which.") == 1
