from __future__ import annotations

import torch
from torch import Tensor

from clp_lightning.metrics import FrontSamples
from clp_lightning.metrics.bootstrap import redraw_within_prompts
from clp_lightning.metrics.samples import within_prompt_covariance

NAN = float("nan")


def samples(prompt_id: list[int], normalized: list[list[float]]) -> FrontSamples:
    zero, values = torch.zeros(len(prompt_id)), torch.tensor(normalized)
    return FrontSamples(
        prompt_id=torch.tensor(prompt_id),
        point=torch.full((len(prompt_id),), -1),
        sample=torch.arange(len(prompt_id)),
        rewards=values,
        normalized=values,
        log_ratio=zero,
        length=zero.long(),
        truncated=zero.bool(),
    )


def test_covariance_by_hand() -> None:
    # Prompt 0: a 0, 2 and b 1, -1: variances 2, 2, covariance -2. Prompt 1 lies elsewhere:
    # a 10, 10 and b 20, 24: 0, 8, 0. Prompt 2 has one sample: nothing.
    got = within_prompt_covariance(
        samples([0, 0, 1, 1, 2], [[0, 1], [2, -1], [10, 20], [10, 24], [99, -99]])
    )
    torch.testing.assert_close(got, torch.tensor([[1.0, -1.0], [-1.0, 5.0]]).double())


def test_covariance_agrees_with_torch() -> None:
    values = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        within_prompt_covariance(samples([5] * 7, values.tolist())), values.double().T.cov()
    )


def test_covariance_uses_what_both_rewards_scored() -> None:
    # b scored the last two only: cov(a, b) from (4, 1), (2, 3); var(a) from 0, 4, 2.
    got = within_prompt_covariance(samples([0, 0, 0], [[0, NAN], [4, 1], [2, 3]]))
    torch.testing.assert_close(got, torch.tensor([[4.0, -2.0], [-2.0, 2.0]]).double())


def test_rewards_that_never_score_together_do_not_covary() -> None:
    got = within_prompt_covariance(samples([0, 0, 1, 1], [[0, NAN], [2, NAN], [NAN, 0], [NAN, 4]]))
    torch.testing.assert_close(got, torch.tensor([[2.0, 0.0], [0.0, 8.0]]).double())


def test_one_sample_a_prompt_has_no_covariance() -> None:
    got = within_prompt_covariance(samples([0, 1], [[0, 1], [2, 3]]))
    assert got.diagonal().isnan().all() and got[0, 1] == 0


def test_cells_are_means_over_what_was_scored() -> None:
    table = samples([3, 3, 8], [[1, NAN], [3, 5], [NAN, 7]])
    cells = table.cells(num_points=1)
    assert cells.shape == (2, 2, 7)
    torch.testing.assert_close(
        cells[:, 0, 2:4], torch.tensor([[2.0, 5.0], [NAN, 7.0]]).double(), equal_nan=True
    )
    assert cells[:, 1].isnan().all()  # nothing at the point of the grid


def test_duplicates_keep_the_first() -> None:
    table = samples([8, 3, 8], [[1, 1], [2, 2], [3, 3]])
    table.sample = torch.zeros(3, dtype=torch.long)
    once = table.deduplicated()
    assert once.prompt_id.tolist() == [3, 8]
    assert once.normalized[:, 0].tolist() == [2, 1]


def test_rows_are_redrawn_within_their_prompt() -> None:
    prompt_id: Tensor = torch.tensor([4, 4, 4, 9, 9])
    index = redraw_within_prompts(prompt_id, 2_000)
    assert torch.equal(prompt_id[index], prompt_id.expand(2_000, 5))
    share = index.flatten().bincount() / (2_000 * torch.tensor([3, 3, 3, 2, 2]))
    torch.testing.assert_close(
        share, torch.tensor([1 / 3, 1 / 3, 1 / 3, 1 / 2, 1 / 2]), rtol=0.05, atol=0
    )
