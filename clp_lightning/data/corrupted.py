"""True summaries beside corrupted ones: what a consistency reward is trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
from datasets import Dataset

from ..described import check_choice
from ..keyed import generator
from .corpus import Corpus
from .corruptions import CORRUPTIONS, Summaries
from .sources import as_source, load_rows

__all__ = ["CorruptedSummaries"]

# Not keyed by the run's seed: every run is judged on the same corruptions.
_KEY = 2**32 + 1


class CorruptedSummaries(Corpus):
    """Documents with their summary and a corrupted one, as preference pairs or as labelled texts.

    The corruptions are ``swapped_word`` (a content word gives way to one of another summary, as
    frequent and as long), ``swapped_words`` (one to three of them), ``other_summary`` (of another
    document), ``shuffled_words`` and ``empty`` (no text). What a row becomes depends on its number
    and on all summaries, and on nothing else. A summary that a corruption cannot change has no row
    for it. Documents are held out with all their rows.

    Pairs have the columns ``document``, ``chosen``, ``rejected`` and ``corruption``. Labelled texts
    have ``document``, ``completion``, ``label`` ("consistent" or "corrupted") and ``corruption``;
    there is a true one for every corrupted one, of the same ``corruption``.

    Args:
        source: Where documents and summaries come from: as for PromptDataModule.
        corruptions: What is made of every summary; a name that stands there twice is drawn twice.
            All if None.
        labelled: Labelled texts instead of pairs.
        document: Column with the document.
        summary: Column with its summary.
        source_config: Configuration of a hub data set.
        split: Split of a folder or hub data set.
    """

    template = "{document}\n\n"
    split_by = "document"

    def __init__(
        self,
        source: str | Corpus | Path | Dataset | pd.DataFrame = "docstrings",
        corruptions: list[str] | None = None,
        labelled: bool = False,
        document: str = "document",
        summary: str = "summary",
        source_config: str | None = None,
        split: str = "train",
    ) -> None:
        self.source = as_source("source", source)
        self.corruptions = list(CORRUPTIONS) if corruptions is None else list(corruptions)
        if not self.corruptions:
            raise ValueError(f"corruptions is empty; name some of {', '.join(CORRUPTIONS)}.")
        for name in self.corruptions:
            check_choice("each of corruptions", name, list(CORRUPTIONS))
        self.labelled, self.document, self.summary = labelled, document, summary
        self.source_config, self.split = source_config, split

    def load(self) -> Dataset:
        """The rows, those of a document side by side, in the source's order.

        Raises:
            ValueError: a column is missing, a row has no text in it, or a corruption can change
                no summary at all.
        """
        rows = load_rows(self.source, self.source_config, self.split)
        if missing := sorted({self.document, self.summary} - set(rows.column_names)):
            raise ValueError(
                f"The source has no column {missing}; it has {sorted(rows.column_names)}. Set "
                "document and summary."
            )
        documents, summaries = list(rows[self.document]), list(rows[self.summary])
        for number, texts in enumerate(zip(documents, summaries, strict=True)):
            if not all(isinstance(text, str) and text.strip() for text in texts):
                raise ValueError(
                    f"Row {number} has an empty document or summary: {texts!r}. Fill it or leave "
                    "it out."
                )
        made = [
            row
            for number, corruption, corrupted in self._corrupted(summaries)
            for row in self._rows(documents[number], summaries[number], corrupted, corruption)
        ]
        if never := set(self.corruptions) - {row["corruption"] for row in made}:
            raise ValueError(
                f"{sorted(never)} can change none of the {len(summaries)} summaries; it needs more "
                "of them, or longer ones."
            )
        return Dataset.from_list(made)

    def _corrupted(self, texts: Sequence[str]) -> Iterator[tuple[int, str, str]]:
        """Row number, name of the corruption and what it made."""
        summaries = Summaries(texts)
        for number, text in enumerate(texts):
            for position, name in enumerate(self.corruptions):
                draw = generator(_KEY, number, position)
                if (corrupted := CORRUPTIONS[name](text, summaries, draw)) is not None:
                    yield number, name, corrupted

    def _rows(
        self, document: str, summary: str, corrupted: str, corruption: str
    ) -> list[dict[str, str]]:
        shared = {"document": document, "corruption": corruption}
        if not self.labelled:
            return [{**shared, "chosen": summary, "rejected": corrupted}]
        return [
            {**shared, "completion": summary, "label": "consistent"},
            {**shared, "completion": corrupted, "label": "corrupted"},
        ]
