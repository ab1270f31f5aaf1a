"""The offline corpus."""

from __future__ import annotations

import pytest

from clp_lightning.data import Docstrings
from clp_lightning.data.corruptions import support
from clp_lightning.data.docstrings import _corpus, _pairs, document_and_summary

PROSE = "Rows with equal names keep the order in which they came, whatever the sort " * 2
SOURCE = f'''
"""Sorting of rows, made easy.

{PROSE}
"""

LABELS = {{"key":
    r"""This is no docstring.

    {PROSE}
    """}}


def sort(rows: list = ("a", "b"),
         reverse=False):  # a comment
    r"""Sort the rows
    by their \\name.

    {PROSE}
    {PROSE}

    They are not copied:

        code()

    Args:
        rows: Any.
    """
'''


def test_pairs_of_a_source_file() -> None:
    first, *rest = _pairs(SOURCE)
    once = PROSE.strip()
    assert first == (once, "Sorting of rows, made easy.")
    assert rest[-1] == (f"{once} {once}", "Sort the rows by their \\name.")


@pytest.mark.parametrize(
    "docstring",
    [
        "Only a summary of three words.",
        "Too short a document.\n\nFew words.",
        f"Summary.\n\n{PROSE}",  # one word
        f"Three words here.\n\nArgs:\n    x: {PROSE}",
        f"Three words here.\n\n- {PROSE}\n- {PROSE}",
        f"Three words here.\n\n>>> f()\n{PROSE}",
        f"Three words here.\n\n    {PROSE}\n\n{PROSE}",
        f"Three words here.\n\nReturns\n-------\n{PROSE}",
    ],
)
def test_what_is_no_pair(docstring: str) -> None:
    assert document_and_summary(docstring) is None


def test_the_corpus_is_large_unique_and_filtered() -> None:
    rows = Docstrings().load()
    assert rows.column_names == ["document", "summary"]
    assert len(rows) > 3000
    assert len(set(rows["document"])) == len(rows)
    few = Docstrings(min_words=20, max_words=45).load()
    assert {20, 45} <= {len(document.split()) for document in few["document"]} <= set(range(20, 46))
    assert 1000 < len(few) < len(rows)
    assert min(len(summary.split()) for summary in rows["summary"]) == 3


def test_documents_that_back_their_summary_up() -> None:
    rows = Docstrings(max_words=45).load()
    shares = [support(d, s) for d, s in zip(rows["document"], rows["summary"], strict=True)]
    kept = Docstrings(max_words=45, min_support=0.33).load()
    backed = [d for d, share in zip(rows["document"], shares, strict=True) if share >= 0.33]
    assert list(kept["document"]) == backed
    assert 0.5 < len(kept) / len(rows) < 0.9
    with pytest.raises(ValueError, match="min_support is a share, between 0 and 1, not 25"):
        Docstrings(min_support=25)


@pytest.mark.parametrize(
    ("summary", "share"),
    [
        ("Sorts the rows by name.", 1.0),  # by their first four letters
        ("Sort SORTED sorting columns.", 0.5),  # once
        ("Delete every column.", 0.0),
        ("Do as of it.", 1.0),  # says nothing
    ],
)
def test_support(summary: str, share: float) -> None:
    assert support("Rows are sorted by their names.", summary) == share


def test_reading_again_gives_the_same_corpus() -> None:
    first = list(_corpus().items())
    _corpus.cache_clear()
    assert list(_corpus().items()) == first


def test_bad_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match="20 <= min_words <= max_words; got 30 and 25"):
        Docstrings(30, 25)
    with pytest.raises(ValueError, match="got 5 and None"):
        Docstrings(5)
