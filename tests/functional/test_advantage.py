from __future__ import annotations

import torch

from clp_lightning.functional import leave_one_out

NAN = float("nan")


def test_leave_one_out() -> None:
    # Siblings of 3 are 1 and 2, mean 1.5, so its advantage is 1.5; and so on.
    got = leave_one_out(torch.tensor([1.0, 2.0, 3.0]), groups=torch.tensor([0, 0, 0]))
    torch.testing.assert_close(got, torch.tensor([-1.5, 0.0, 1.5]))


def test_groups_do_not_mix_in_any_order() -> None:
    got = leave_one_out(
        torch.tensor([1.0, 10.0, 2.0, 30.0, 6.0]), groups=torch.tensor([1, 0, 1, 0, 1])
    )
    # Group 1 holds 1, 2, 6; group 0 holds 10, 30.
    torch.testing.assert_close(got, torch.tensor([-3.0, -20.0, -1.5, 20.0, 4.5]))


def test_what_was_not_scored_has_no_signal_and_is_no_sibling() -> None:
    values = torch.tensor([[1.0, NAN], [NAN, NAN], [4.0, 5.0]])
    got = leave_one_out(values, groups=torch.zeros(3, dtype=torch.long))
    # Column 0: siblings 1 and 4. Column 1: 5 has no scored sibling.
    torch.testing.assert_close(got, torch.tensor([[-3.0, 0.0], [0.0, 0.0], [3.0, 0.0]]))


def test_a_response_alone_has_no_signal() -> None:
    assert leave_one_out(torch.tensor([5.0]), groups=torch.tensor([0])).tolist() == [0.0]


def test_columns_and_tokens_are_separate() -> None:
    values = torch.randn(6, 3, 2)
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    got = leave_one_out(values, groups=groups)
    for t in range(3):
        for k in range(2):
            torch.testing.assert_close(
                got[:, t, k], leave_one_out(values[:, t, k].clone(), groups=groups)
            )


def test_shift_leaves_it_alone_and_scale_scales_it() -> None:
    values, groups = torch.randn(8, dtype=torch.float64), torch.arange(8) // 4
    base = leave_one_out(values, groups=groups)
    torch.testing.assert_close(leave_one_out(values + 7, groups=groups), base)
    torch.testing.assert_close(leave_one_out(3 * values, groups=groups), 3 * base)
