"""The ordinary task, as it was when its numbers were measured: its figures are compared to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clp_lightning.conditioning import LoRA
from clp_lightning.exact import ExactTask, exact_reference_logp
from clp_lightning.policy import Policy

CHAIN = [
    *(-11.593911389, -7.982645410, -7.944819267, -7.498813271),
    *(-9.419020985, -11.906998877, -6.956996380, -8.840472141),
]
BASE = [-11.57184, -7.98015, -7.94534, -7.50817, -9.38324, -11.76451, -6.95297, -8.89453]
PROMPTS = ["a e", "c f", "d c", "b f", "a d", "d a", "c e", "e a"]
PROMPTS_STOP = ["a e", "b c", "d b", "c d", "a d", "d e", "e d", "e c"]


@pytest.mark.parametrize(
    ("task", "prompts", "rewards"),
    [
        (ExactTask(), PROMPTS, [0.908856543, -1.937919287, -0.072529564, 0.016643923]),
        (
            ExactTask(stop=True),
            PROMPTS_STOP,
            [1.239925313, -1.982413322, 0.089782511, -0.068306228],
        ),
    ],
    ids=["fixed", "stop"],
)
def test_tables(task: ExactTask, prompts: list[str], rewards: list[float]) -> None:
    assert task.prompts == prompts
    expected = torch.tensor(CHAIN, dtype=torch.float64)
    torch.testing.assert_close(task.chain_logp[:, 7], expected, rtol=0, atol=1e-8)
    ends = task.rewards[[0, -1], 7].flatten()
    torch.testing.assert_close(ends, torch.tensor(rewards, dtype=torch.float64), rtol=0, atol=1e-8)


def test_base(base_folder: Callable[[ExactTask], Path]) -> None:
    task = ExactTask()
    policy = Policy(str(base_folder(task)), LoRA())
    policy.build(["first", "second"])
    logp = exact_reference_logp(policy, task)[:, 7]
    torch.testing.assert_close(logp, torch.tensor(BASE, dtype=torch.float64), rtol=0, atol=1e-2)
