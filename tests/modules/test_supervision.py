"""What reward models learn from: margins and decisions by hand, bad rows named early."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clp_lightning import (
    ClassLabels,
    PreferencePairs,
    PromptBatch,
    ScalarLabels,
)
from tests.reward_models import (
    as_chat,
    make_data,
    make_module,
    make_trainer,
    pairs,
    without_prompt,
)


def batch_of(**columns: list[Any]) -> PromptBatch:
    rows = len(next(iter(columns.values())))
    return PromptBatch(columns.pop("prompts", ["p"] * rows), torch.arange(rows), columns)


def test_a_margin_by_hand() -> None:
    # Leads of 2 and -1, less margins of 0.5 and 1: -log sigmoid(1.5) and -log sigmoid(-2).
    scores = torch.tensor([[3.0], [0.0], [1.0], [1.0]])
    batch = batch_of(chosen=["a", "b"], rejected=["c", "d"], margin=[0.5, 1])
    expected = [math.log(1 + math.exp(-1.5)), math.log(1 + math.exp(2.0))]
    torch.testing.assert_close(PreferencePairs().losses(scores, batch), torch.tensor(expected))


def test_the_absolute_loss_by_hand() -> None:
    # A lead of 1: -log sigmoid(1). Alone: mean of -log sigmoid(2) and -log sigmoid(-1), 3 times.
    batch = batch_of(chosen=["a"], rejected=["c"])
    expected = math.log(1 + math.exp(-1)) + 3 * (
        (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1))) / 2
    )
    scores = torch.tensor([[2.0], [1.0]])
    torch.testing.assert_close(
        PreferencePairs(absolute=3.0).losses(scores, batch), torch.tensor([expected])
    )
    with pytest.raises(ValueError, match="absolute must not be negative; it is -1"):
        PreferencePairs(absolute=-1)


def test_decisions_of_classes() -> None:
    scores = torch.tensor([[0.2, 0.7, 0.1], [0.5, 0.1, 0.4]]).log()
    decided = ClassLabels(["x", "y", "z"]).decisions(scores, batch_of(label=["y", 2]))
    torch.testing.assert_close(decided[0], torch.tensor([0.7, 0.5]))
    assert decided[1].tolist() == [True, False]


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (None, {"rejected": None}, r"Row 5: rejected is None; it must be text or messages"),
    (None, {"chosen": " \n"}, r"Row 5: chosen is ' \\n'; it must be text or messages"),
    (None, {"chosen": "so", "rejected": "so"}, r"Row 5: chosen and rejected are the same, 'so'"),
    (None, {"margin": math.nan}, r"Row 5: the margin is nan; it must be a finite number"),
    (ClassLabels(["no", "yes"]), {"label": 2}, r"Row 5: the label is 2; classes are 0, 1, … of no"),
    (ClassLabels(["no", "yes"]), {"label": -1}, r"Row 5: the label is -1; classes"),
    (ScalarLabels(), {"label": None}, r"Row 5: the label is None; it must be a finite number"),
    (ScalarLabels(), {"prompt": "", "completion": ""}, r"Row 5 has an empty prompt"),
]


@pytest.mark.parametrize(("supervision", "change", "message"), BAD)
def test_a_bad_row_is_named_before_the_model_is_loaded(
    supervision: Any,
    change: dict[str, Any],
    message: str,
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    rows = [{**row, "label": 1, "margin": 0.0, "completion": "x"} for row in pairs()]
    rows[5] |= change
    module = make_module(tiny_folder(), supervision=supervision)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path).fit(module, make_data(rows))
    assert not module.policy.is_built


@pytest.mark.parametrize(
    ("supervision", "message"),
    [
        (None, r"no column \['chosen', 'rejected'\] to learn from; it has \['answer'\]"),
        (ScalarLabels(), r"no column \['label'\] to learn from; it has \['answer'\] .*NAME"),
    ],
)
def test_a_missing_column_is_named_before_the_model_is_loaded(
    supervision: Any, message: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    module = make_module(tiny_folder(), supervision=supervision)
    rows = [{"prompt": row["prompt"], "answer": row["chosen"]} for row in pairs()]
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path).fit(module, make_data(rows))
    assert not module.policy.is_built


def test_other_mistakes(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two or more different classes"):
        ClassLabels(["one", "one"])
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        make_module(tiny_folder(), max_length=0)
    whole = [without_prompt(row) for row in pairs()]
    with pytest.raises(ValueError, match="needs a prompt to make a user turn of"):
        make_data(whole, conversational=True).setup()
    with pytest.raises(ValueError, match="has no chat template"):
        make_trainer(tmp_path).fit(
            make_module(tiny_folder()), make_data([as_chat(row) for row in pairs()])
        )
