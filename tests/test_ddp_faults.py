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
        file: It gets the time of every failure, a line each.
    """

    def __init__(self, how: str, after: int, file: str) -> None:
        self.how, self.after, self.file = how, after, Path(file)
        self.calls = 0

    def __call__(self, prompts: Any, completions: list[str], **columns: Any) -> list[float]:
        self.calls += 1
        if os.environ.get("LOCAL_RANK") == "1" and self.calls > self.after:
            with self.file.open("a") as file:
                file.write(f"{time.time()}\n")
            match self.how:
                case "raises":
                    raise ConnectionError("nobody there")
                case "exits":
                    raise SystemExit(0)
                case "hangs":
                    time.sleep(1000)
            return [math.nan] * len(completions)
        return [float(len(text) % 3) for text in completions]


# Two calls on each process for the statistics, two for the first step, and then a front.
@pytest.mark.parametrize(
    ("layout", "how", "after", "chunks", "message"),
    [
        ("ddp", "raises", 0, 1, "raised ConnectionError: nobody there"),
        ("ddp", "hangs", 2, 1, "did not answer within 2 s"),
        ("ddp", "exits", 2, 1, "raised SystemExit: 0"),
        ("ddp", "returns NaN", 2, 1, "returned nan"),
        ("ddp", "raises", 4, 1, "raised ConnectionError: nobody there"),
        ("ddp", "raises", 3, 2, "raised ConnectionError: nobody there"),  # half a batch scored
        ("fsdp", "returns NaN", 0, 1, "returned nan"),
        ("fsdp", "raises", 2, 1, "raised ConnectionError: nobody there"),
        ("fsdp", "hangs", 4, 1, "did not answer within 2 s"),
    ],
    ids=[
        "statistics",
        "training, hangs",
        "training, exits",
        "training, NaN",
        "front",
        "chunk",
        "shards, statistics",
        "shards, training",
        "shards, front",
    ],
)
def test_a_reward_that_fails_on_one_process_ends_both(
    layout: str,
    how: str,
    after: int,
    chunks: int,
    message: str,
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    ends_together("fit", layout, how, after, chunks, message, tiny_folder(), tmp_path)


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_predictions_end_together_too(
    layout: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    message = "raised ConnectionError: nobody there"
    ends_together("predict", layout, "raises", 1, 1, message, tiny_folder(), tmp_path)


def ends_together(
    command: str, layout: str, how: str, after: int, chunks: int, message: str, base: Path, to: Path
) -> None:
    """Checks what two processes say when a reward fails on the second one, and how soon."""
    config = run_config(to, base, max_steps=4, val_check_interval=2)
    config["model"]["init_args"] |= {
        "rewards": {
            "kind": "tests.runs.kind",
            "failing": {
                "class_path": "tests.test_ddp_faults.FailsOnOne",
                "init_args": {"how": how, "after": after, "file": str(to / "failed")},
            },
        },
        "reward_timeout": 2.0,
        "rollout_chunks": chunks,
    }
    config["data"]["init_args"] |= {"eval_batch_size": 1, "holdout": 6}
    path = write_config(to / "config.yaml", config)
    assert statuses_of_two(run, [command, "--config", path], 300, to, layout) == [2, 2]
    failed = list(map(float, (to / "failed").read_text().split()))
    assert time.time() - failed[0] < 30  # for the end of all
    # Once, or about the first response again, to tell whose fault it is.
    assert len(failed) <= (1 if how == "hangs" else 2 * chunks)
    texts = [(to / f"output-{rank}").read_text() for rank in range(2)]
    assert texts[0].count(f"Reward 'failing' {message}") == 1
    (line,) = (line for line in texts[0].splitlines() if "error:" in line)
    assert "On rank 1." in line and "Prompt: '" in line and "Completion: '" in line
    assert "Reward 'failing'" not in texts[1]
    assert texts[1].count("A reward failed on rank 1; rank 0 says which.") == 1
