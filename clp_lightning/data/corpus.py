"""What a source of rows is that is an object of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from ..described import Described

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Corpus"]


class Corpus(Described, ABC):
    """Rows that are made rather than read from a file.

    Attributes:
        template: Makes the prompt of a row where the data module names no template.
        split_by: A column: rows that agree in it are held out together. Every row for itself
            if None.
    """

    template: ClassVar[str]
    split_by: ClassVar[str | None] = None

    @abstractmethod
    def load(self) -> Dataset:
        """The rows, always in the same order."""
