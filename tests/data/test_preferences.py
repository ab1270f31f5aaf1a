"""Formats of the data that reward models learn from."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from clp_lightning import DocstringPairs, PromptBatch, RewardDataModule


def every_row(rows: list[dict[str, Any]], **options: Any) -> list[PromptBatch]:
    data = RewardDataModule(Dataset.from_list(rows), holdout=1, batch_size=2, **options)
    data.setup("fit")
    return list(data.every_batch())


def test_texts_with_and_without_a_prompt() -> None:
    rows = [{"chosen": f"yes {i}", "rejected": f"no {i}", "margin": i} for i in range(5)]
    train, evaluation = every_row(rows)
    assert train.prompts == [""] * 4 and evaluation.prompts == [""]
    assert sorted([*train.prompt_ids.tolist(), *evaluation.prompt_ids.tolist()]) == list(range(5))
    assert train.columns["chosen"] == [f"yes {i}" for i in train.prompt_ids.tolist()]
    assert train.columns["margin"] == train.prompt_ids.tolist()
    train, _ = every_row(
        [{**row, "question": f"{i}?"} for i, row in enumerate(rows)], columns={"prompt": "question"}
    )
    assert train.prompts == [f"{i}?" for i in train.prompt_ids.tolist()]
    assert set(train.columns) == {"chosen", "rejected", "margin"}
    train, _ = every_row(
        [{"good": "a", "bad": "b"}] * 5, columns={"chosen": "good", "rejected": "bad"}
    )
    assert train.prompts == [""] * 4 and train.columns == {
        "chosen": ["a"] * 4,
        "rejected": ["b"] * 4,
    }


def test_labelled_texts_and_conversations() -> None:
    train, _ = every_row([{"text": "so", "label": 1}] * 5)
    assert train.prompts == ["so"] * 4 and train.columns == {"label": [1] * 4}
    messages = [{"role": "user", "content": "tea?"}, {"role": "assistant", "content": "owl"}]
    train, _ = every_row([{"messages": messages, "label": 0.5}] * 5)
    assert train.prompts[0] == messages[:1] and train.columns["completion"][0] == messages[1:]


def test_data_without_anything_to_score() -> None:
    with pytest.raises(ValueError, match="No column is called prompt, messages or text"):
        every_row([{"chosen": "a", "label": 1}] * 5)


def test_pairs_of_the_offline_corpus() -> None:
    rows = DocstringPairs(min_words=20, max_words=24).load()
    assert rows.column_names == ["document", "chosen", "rejected"] and len(rows) > 50
    assert all(row["chosen"] != row["rejected"] for row in rows)
    # Every summary is as often right as wrong, but for the few pairs that were left out.
    assert len(set(rows["chosen"]) - set(rows["rejected"])) <= 2
    assert rows[0] == DocstringPairs(min_words=20, max_words=24).load()[0]
    data = RewardDataModule(DocstringPairs(max_words=24), batch_size=2)
    data.setup("fit")
    batch = next(data.every_batch())
    assert batch.prompts[0] == batch.columns["document"][0] + "\n\n"
