from __future__ import annotations

from typing import Any

import pytest
import torch

from clp_lightning.exact import ExactTask


def test_fixed_length_lists_every_string() -> None:
    task = ExactTask()
    assert len(task.responses) == 6**4 == 1296
    assert len(task.responses.unique(dim=0)) == 1296
    assert task.response_mask.all()
    assert task.stop_id is None


def test_stop_lists_what_a_sampler_returns() -> None:
    # Five tokens go on, one stops: 1 + 5 + 25 responses shorter than 4, and 5^3 prefixes of
    # three tokens followed by any of the 6.
    task = ExactTask(stop=True)
    assert len(task.responses) == 1 + 5 + 25 + 125 * 6 == 781
    assert torch.bincount(task.response_mask.sum(-1)).tolist() == [0, 1, 5, 25, 750]
    for ids, mask in zip(task.responses.tolist(), task.response_mask.tolist(), strict=True):
        body = ids[: sum(mask)]
        assert 5 not in body[:-1]
        assert body[-1] == 5 or len(body) == 4


@pytest.mark.parametrize("stop", [False, True])
def test_chain_is_a_distribution_over_the_responses(stop: bool) -> None:
    task = ExactTask(stop=stop)
    torch.testing.assert_close(task.chain_logp.exp().sum(-1), torch.ones(8, dtype=torch.float64))


def test_chain_of_one_response_by_hand() -> None:
    task = ExactTask(stop=True)
    first, then = task.chain
    row = task.response_index[2, 4, 5]
    expected = first[3, 2] + then[3, 2, 4] + then[3, 4, 5]
    torch.testing.assert_close(task.chain_logp[3, row], expected)


@pytest.mark.parametrize("stop", [False, True])
def test_rewards_are_standardised_per_context(stop: bool) -> None:
    rewards = ExactTask(stop=stop, num_rewards=3).rewards
    assert rewards.shape == (8, 781 if stop else 1296, 3)
    torch.testing.assert_close(rewards.mean(1), torch.zeros(8, 3, dtype=torch.float64))
    torch.testing.assert_close(
        rewards.square().mean(1).sqrt(), torch.ones(8, 3, dtype=torch.float64)
    )


def test_rewards_are_unary_and_pair_tables() -> None:
    # Swapping the middle parts of two strings that share the tokens around the cut moves the
    # same table entries about: the sum of both rewards stays.
    task = ExactTask()
    at = task.response_index
    one, two = at[0, 1, 2, 3], at[4, 1, 2, 5]
    crossed = at[0, 1, 2, 5], at[4, 1, 2, 3]
    total = task.rewards[:, [one, two]].sum(1)
    torch.testing.assert_close(total, task.rewards[:, list(crossed)].sum(1))
    assert (task.rewards[:, one] - task.rewards[:, crossed[0]]).abs().max() > 0.1


def test_everything_follows_from_the_seed() -> None:
    one, again, other = ExactTask(task_seed=1), ExactTask(task_seed=1), ExactTask(task_seed=2)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert one == again != other
    assert torch.equal(one.rewards, again.rewards)
    assert torch.equal(one.chain_logp, again.chain_logp)
    assert torch.equal(one.contexts, again.contexts)
    assert not torch.equal(one.rewards, other.rewards)
    assert torch.equal(before, torch.get_rng_state())


def test_more_rewards_keep_the_first_ones() -> None:
    two, three = ExactTask(num_rewards=2), ExactTask(num_rewards=3)
    assert torch.equal(two.rewards, three.rewards[..., :2])


def test_correlated_rewards() -> None:
    def correlation(c: float) -> torch.Tensor:
        rewards = ExactTask(correlation=c, num_rewards=3, num_contexts=30).rewards
        return torch.stack([torch.corrcoef(r.T) for r in rewards]).mean(0)[0]

    # 30 contexts: the mean over random tables is the argument to about 0.05.
    torch.testing.assert_close(
        correlation(0.7), torch.tensor([1, 0.7, 0.7]).double(), atol=0.1, rtol=0
    )
    torch.testing.assert_close(
        correlation(-0.5), torch.tensor([1, -0.5, -0.5]).double(), atol=0.15, rtol=0
    )
    assert torch.equal(ExactTask(correlation=0.7).rewards[..., 0], ExactTask().rewards[..., 0])


@pytest.mark.parametrize("stop", [False, True])
def test_contexts_are_distinct_and_never_stop(stop: bool) -> None:
    task = ExactTask(stop=stop, num_contexts=20)
    assert len(set(task.prompts)) == 20
    assert (task.contexts[:, 0] != task.contexts[:, 1]).all()
    assert not stop or (task.contexts != task.stop_id).all()


def test_rows_refuses_what_is_no_response() -> None:
    task = ExactTask(stop=True)
    assert task.rows([[5], [0, 0, 0, 0]]) == [task.response_index[5,], 0]
    with pytest.raises(ValueError, match="max_new_tokens to 4"):
        task.rows([[5, 0]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tokens": 1}, "num_tokens"),
        ({"num_tokens": 27}, "num_tokens"),
        ({"length": 0}, "length"),
        ({"length": 9}, "length"),
        ({"num_contexts": 31}, r"1\.\.30"),
        ({"num_contexts": 21, "stop": True}, r"1\.\.20"),
        ({"task_seed": -1}, "task_seed"),
        ({"num_rewards": 0}, "num_rewards"),
        ({"correlation": 1.1}, "correlation"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExactTask(**arguments)
