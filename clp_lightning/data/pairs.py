"""Preference pairs that need no download: a document's own summary against another one's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .docstrings import Docstrings

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["DocstringPairs"]


class DocstringPairs(Docstrings):
    """Documents of the offline corpus: ``chosen`` is their summary, ``rejected`` another one's.

    Every summary is chosen once and rejected once, so it cannot be told by itself.

    Args:
        min_words: Leave out documents with fewer words (20 is the least there is).
        max_words: Leave out documents with more words.
    """

    template = "{document}\n\n"

    def load(self) -> Dataset:
        """The pairs, columns ``document``, ``chosen`` and ``rejected``, in a fixed order."""
        rows = super().load().rename_column("summary", "chosen")
        chosen = list(rows["chosen"])
        half = len(chosen) // 2
        rejected = chosen[half:] + chosen[:half]
        differ = [i for i in range(len(chosen)) if chosen[i] != rejected[i]]
        return rows.add_column("rejected", rejected).select(differ)
