"""How summaries are made wrong: one word, another summary, another order; repeatable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from datasets import Dataset

from clp_lightning import CorruptedSummaries, Docstrings, PromptDataModule, RewardDataModule
from clp_lightning.data.corruptions import (
    CORRUPTIONS,
    Summaries,
    content_words,
    other_summary,
    shuffled_words,
    swapped_word,
    swapped_words,
)
from clp_lightning.keyed import generator

TEXTS = [
    "Return the sorted rows.",
    "Delete every column of a table.",
    "RETURN the number of rows_read.",
    "Close all open files.",
    "Write the values into files.",
]
POOL = Summaries(TEXTS)


def test_content_words_are_whole_words_that_say_something() -> None:
    words = [word[0] for word in content_words("Return the x and rows_read of 3 Files, not of it.")]
    assert words == ["Return", "Files"]
    assert POOL.frequency["return"] == POOL.frequency["files"] == 2
    assert POOL.frequency["rows"] == 1


def test_similar_words_by_hand() -> None:
    # From "close" (once, 5 letters): "write" and "table" (once, 5), then "files" (twice, 5: one
    # doubling) beside the words that are a letter longer or shorter.
    similar = POOL.similar("close")
    assert similar[:2] == ["table", "write"]
    assert set(similar[2:8]) == {"files", "open", "rows", "column", "delete", "number"}
    assert "close" not in similar and "closed" not in Summaries([*TEXTS, "Closed."]).similar(
        "close"
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_swapped_word_is_one_other_word(seed: int) -> None:
    summary = TEXTS[seed % len(TEXTS)]
    changed = swapped_word(summary, POOL, generator(seed))
    assert changed is not None
    old, new = summary.split(), changed.split()
    (position,) = [i for i in range(len(old)) if old[i] != new[i]]
    was, became = old[position].strip("."), new[position].strip(".")
    assert content_words(was) and became.lower() in POOL.frequency
    assert became.lower() not in summary.lower()
    assert became.isupper() == was.isupper() and became[0].isupper() == was[0].isupper()


def test_one_to_three_swapped_words() -> None:
    summary = TEXTS[1]
    changed = Counter()
    for seed in range(200):
        text = swapped_words(summary, POOL, generator(seed))
        assert text is not None and text != summary
        pairs = zip(summary.split(), text.split(), strict=True)
        changed[sum(old != new for old, new in pairs)] += 1
    # A word that is swapped twice counts once.
    assert set(changed) == {1, 2, 3} and min(changed.values()) > 15
    assert swapped_words("as of x_1", POOL, generator(0)) is None


@pytest.mark.parametrize("seed", range(20))
def test_another_summary_and_another_order(seed: int) -> None:
    summary = TEXTS[seed % len(TEXTS)]
    assert other_summary(summary, POOL, generator(seed)) in set(TEXTS) - {summary}
    shuffled = shuffled_words(summary, POOL, generator(seed))
    assert shuffled is not None and shuffled != summary
    assert Counter(shuffled.split()) == Counter(summary.split())


def test_every_other_summary_can_come() -> None:
    drawn = Counter(other_summary(TEXTS[1], POOL, generator(i)) for i in range(400))
    assert set(drawn) == set(TEXTS) - {TEXTS[1]} and min(drawn.values()) > 70


def test_what_cannot_be_changed() -> None:
    assert swapped_word("as of x_1", POOL, generator(0)) is None
    assert shuffled_words("so so", POOL, generator(0)) is None
    assert other_summary("alone", Summaries(["alone"] * 2), generator(0)) is None


def test_neither_order_nor_history_matters() -> None:
    turned = Summaries(TEXTS[::-1] + TEXTS)
    for corruption in CORRUPTIONS.values():
        forward = [corruption(text, POOL, generator(7, i)) for i, text in enumerate(TEXTS)]
        backward = [
            corruption(TEXTS[i], turned, generator(7, i)) for i in reversed(range(len(TEXTS)))
        ]
        assert forward == backward[::-1]


ROWS = [{"article": f"Document {i}.", "title": text} for i, text in enumerate(TEXTS)]


def source(**options: bool | list[str]) -> CorruptedSummaries:
    rows = Dataset.from_list(ROWS)
    return CorruptedSummaries(rows, document="article", summary="title", **options)  # type: ignore[arg-type]


def test_pairs_and_labelled_texts_of_any_columns() -> None:
    kinds = ["swapped_word", "other_summary", "swapped_word"]
    pairs = source(corruptions=kinds).load().to_list()
    assert [row["corruption"] for row in pairs] == kinds * 5
    assert [row["document"] for row in pairs[:4]] == ["Document 0."] * 3 + ["Document 1."]
    assert all(row["chosen"] == TEXTS[i // 3] != row["rejected"] for i, row in enumerate(pairs))
    # A name that stands there twice is drawn twice.
    assert any(a["rejected"] != b["rejected"] for a, b in zip(pairs[::3], pairs[2::3], strict=True))

    labelled = source(corruptions=kinds, labelled=True).load().to_list()
    for pair, true, corrupted in zip(pairs, labelled[::2], labelled[1::2], strict=True):
        shared = {"document": pair["document"], "corruption": pair["corruption"]}
        assert true == {**shared, "completion": pair["chosen"], "label": "consistent"}
        assert corrupted == {**shared, "completion": pair["rejected"], "label": "corrupted"}


def test_a_summary_that_cannot_be_changed_has_no_row_for_it() -> None:
    rows = Dataset.from_list([*ROWS, {"article": "Last.", "title": "as of x_1"}])
    made = CorruptedSummaries(rows, document="article", summary="title").load().to_list()
    assert [r["corruption"] for r in made[-3:]] == ["other_summary", "shuffled_words", "empty"]
    assert len(made) == 5 * 5 + 3 and made[-1]["rejected"] == ""


@pytest.mark.parametrize("labelled", [False, True])
def test_documents_are_held_out_whole_and_as_elsewhere(labelled: bool) -> None:
    corpus = Docstrings(20, 22)
    made = RewardDataModule(CorruptedSummaries(corpus, labelled=labelled), holdout=9, batch_size=4)
    plain = PromptDataModule(corpus, holdout=9, batch_size=4)
    made.setup("fit")
    plain.setup("fit")
    held_out = {d for batch in made.eval_batches() for d in batch.columns["document"]}
    assert held_out == documents(plain)
    everything = [d for batch in made.every_batch() for d in batch.columns["document"]]
    assert set(everything) - held_out == set(corpus.load()["document"]) - held_out
    rows = 10 if labelled else 5
    assert max(Counter(everything).values()) == rows
    assert sum(len(batch) for batch in made.eval_batches()) in range(9 * rows - 4, 9 * rows + 1)
    batch = next(made.eval_batches())
    assert batch.prompts[0] == batch.columns["document"][0] + "\n\n"


def documents(data: PromptDataModule) -> set[str]:
    return {d for batch in data.val_dataloader() for d in batch.columns["document"]}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CorruptedSummaries(corruptions=[]), "corruptions is empty"),
        (
            lambda: CorruptedSummaries(corruptions=["typos"]),
            "must be 'swapped_word', 'other_",
        ),
        (lambda: CorruptedSummaries(Dataset.from_list(ROWS)).load(), r"no column \['document', "),
        (
            lambda: CorruptedSummaries(
                Dataset.from_list([{"document": "So.", "summary": " "}])
            ).load(),
            "Row 0 has an empty document or summary",
        ),
        (
            lambda: CorruptedSummaries(
                Dataset.from_list([{"document": "So.", "summary": "One alone."}])
            ).load(),
            r"\['other_summary', 'swapped_word', .* can change none of the 1 summaries",
        ),
    ],
)
def test_mistakes_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
