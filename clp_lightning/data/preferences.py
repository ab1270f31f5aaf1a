"""Data that reward models learn from: pairs in TRL's preference format, or labelled texts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..types import Prompt, PromptBatch
from .collate import PromptFormat
from .prompts import PromptDataModule, PromptDataset
from .sampler import BatchKey

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["RewardDataModule"]

_ROWS_AT_ONCE = 256


class _TextFormat(PromptFormat):
    """As ``PromptFormat``; where chosen and rejected hold whole texts, the prompt is empty."""

    def __init__(
        self,
        columns: Collection[str],
        rename: Mapping[str, str] | None = None,
        template: str | None = None,
        system: str | None = None,
        conversational: bool = False,
    ) -> None:
        rename = rename or {}
        names = {*columns, *rename} - set(rename.values())
        self.whole = (
            template is None
            and {"chosen", "rejected"} <= names
            and names.isdisjoint({"prompt", "messages", "text"})
        )
        if self.whole and conversational:
            raise ValueError(
                "conversational=true needs a prompt to make a user turn of; the data has whole "
                "texts in chosen and rejected. Leave it out, or write them as messages."
            )
        super().__init__(columns, rename, "" if self.whole else template, system, conversational)

    def check(self, rows: Dataset) -> None:
        if not self.whole:
            super().check(rows)

    def _prompt(self, row: dict[str, Any], prompt_id: int) -> Prompt:
        return "" if self.whole else super()._prompt(row, prompt_id)


class RewardDataModule(PromptDataModule):
    """Preference pairs or labelled texts, for ``RewardModule``; arguments of PromptDataModule.

    Pairs are in TRL's preference format: ``chosen`` and ``rejected``, with ``prompt`` or without
    (then they hold the whole text), each a string or messages, optionally a ``margin``. Labelled
    texts are ``text`` (or ``messages``, or ``prompt`` with ``completion``) and ``label``. Other
    names are mapped by ``columns``.
    """

    format_class = _TextFormat

    def every_batch(self) -> Iterator[PromptBatch]:
        """All rows for training and evaluation once, to be checked; known after ``setup``."""
        yield from _batches(self._ready())
        yield from self.eval_batches()

    def eval_batches(self) -> Iterator[PromptBatch]:
        """All rows for evaluation once, on every process; known after ``setup``."""
        assert self._eval is not None
        return _batches(self._eval)


def _batches(data: PromptDataset) -> Iterator[PromptBatch]:
    for start in range(0, len(data), _ROWS_AT_ONCE):
        rows = tuple(range(start, min(start + _ROWS_AT_ONCE, len(data))))
        yield data[BatchKey(rows, 0, 0, 1, len(rows))]
