from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clp_lightning.conditioning import LoRA
from clp_lightning.exact import ExactDataModule, ExactTask, HardTask, exact_reference_logp
from clp_lightning.policy import Policy


@pytest.fixture(scope="module")
def task() -> HardTask:
    return HardTask()


def interaction(values: Tensor, num_tokens: int) -> Tensor:
    """What of ``values`` (X, ...) is no sum of a part per context token."""
    table = values.unflatten(0, (num_tokens, num_tokens))
    return table - table[:1] - table[:, :1] + table[:1, :1]


def test_contexts_are_all_pairs(task: HardTask) -> None:
    assert task.num_contexts == len(set(task.prompts)) == 36
    assert len(task.responses) == 7776
    assert set(task.prompts) == {f"{a} {b}" for a in "abcdef" for b in "abcdef"}
    assert task.prompts[0] == "a a" and task.prompts[-1] == "f f"


@pytest.mark.parametrize("task_seed", range(5))
@pytest.mark.parametrize(("num_tokens", "num_unseen"), [(6, 9), (3, 3), (4, 0)])
def test_every_token_is_seen_in_both_places(
    task_seed: int, num_tokens: int, num_unseen: int
) -> None:
    task = HardTask(task_seed, num_tokens, length=2, num_unseen=num_unseen)
    assert task.unseen.sum() == num_unseen
    seen = task.contexts[~task.unseen]
    for place in seen.T:
        assert len(place.unique()) == num_tokens


def test_unseen_contexts_follow_from_the_seed(task: HardTask) -> None:
    assert torch.equal(task.unseen, HardTask().unseen)
    assert not torch.equal(task.unseen, HardTask(task_seed=1).unseen)
    assert not ExactTask().unseen.any()


def test_tables_are_sums_of_a_part_per_context_token(task: HardTask) -> None:
    first, then = task.chain
    for logp in (first, then):
        logits = logp - logp[..., :1]  # free of the normalisation
        assert interaction(logits, 6).abs().max() < 1e-10
        assert logits.var() > 1
    torch.testing.assert_close(task.chain_logp.exp().sum(-1), torch.ones(36, dtype=torch.float64))
    *dense, sparse = task._raw_rewards()
    for total in dense:
        assert interaction(total, 6).abs().max() < 1e-10
        assert interaction(total[:, :1] - total[:, 1:], 6).abs().max() < 1e-10
    assert interaction(sparse, 6).abs().max() > 0.5


def test_two_rewards_agree_one_opposes_one_is_sparse() -> None:
    correlations, n = torch.zeros(4, 4, dtype=torch.float64), 8
    for task_seed in range(n):
        rewards = HardTask(task_seed, length=3).rewards.flatten(0, 1)
        correlations += torch.corrcoef(rewards.T) / n
    assert correlations[0, 1] == pytest.approx(0.7, abs=0.1)
    assert correlations[0, 2] == pytest.approx(-0.7, abs=0.1)
    assert correlations[1, 2] == pytest.approx(-0.49, abs=0.15)
    assert correlations[3, :3].abs().max() < 0.1


def test_rewards_are_standardised_per_context(task: HardTask) -> None:
    rewards = task.rewards
    assert rewards.shape == (36, 7776, 4)
    torch.testing.assert_close(rewards.mean(1), torch.zeros(36, 4, dtype=torch.float64))
    torch.testing.assert_close(
        rewards.square().mean(1).sqrt(), torch.ones(36, 4, dtype=torch.float64)
    )
    # A tenth of the responses has (1 - p) / sqrt(p (1 - p)) = 3, the others have -1/3.
    sparse = rewards[..., 3]
    assert ((sparse > 0).double().mean(1) - 0.1).abs().max() < 1e-3
    assert (sparse.amax(1) - 3).abs().max() < 0.01
    assert (sparse.amin(1) + 1 / 3).abs().max() < 0.01


def test_training_and_fronts_never_see_the_unseen(task: HardTask, tmp_path: Path) -> None:
    data = ExactDataModule(task, str(tmp_path / "base"), copies=2, batch_size=9, seed=0)
    data.setup()
    batches = list(data.train_dataloader())
    contexts = sorted(x for batch in batches for x in batch.columns["context"])
    seen = (~task.unseen).nonzero().flatten().tolist()
    assert contexts == sorted(seen * 2) and len(seen) == 27
    assert [p for batch in batches for p in batch.prompts] == [
        task.prompts[x] for batch in batches for x in batch.columns["context"]
    ]
    (batch,) = data.val_dataloader()
    assert batch.columns["context"] == seen


def test_base_knows_every_context(base_folder: Callable[[ExactTask], Path]) -> None:
    task = HardTask()
    policy = Policy(str(base_folder(task)), LoRA())
    policy.build(["a", "b", "c", "d"])
    logp = exact_reference_logp(policy, task)
    kl = (task.chain_logp.exp() * (task.chain_logp - logp)).sum(-1)
    # Nats a response; 0.010 both for the seen and for the unseen, 0.014 for the pairs of equals.
    assert (kl < 0.03).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_unseen": 16}, r"num_unseen must lie in 0\.\.15"),
        ({"num_unseen": -1}, "num_unseen"),
        ({"num_tokens": 1}, "num_tokens"),
        ({"length": 7}, "length"),
        ({"task_seed": -1}, "task_seed"),
    ],
)
def test_bad_arguments(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HardTask(**arguments)


def test_arguments_rebuild_the_task() -> None:
    task = HardTask(task_seed=3, num_unseen=4)
    assert HardTask(**task.arguments()) == task != HardTask(task_seed=3)
