"""An offline corpus: what Python's own documentation says, and its one-line summaries.

Docstrings of the standard library, torch, transformers and numpy, read from their source files
without importing them: always there, nothing to download, under two seconds.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .corpus import Corpus
from .corruptions import support

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Docstrings", "document_and_summary"]

_PACKAGES = ("torch", "transformers", "numpy")
_SKIPPED = {"site-packages", "test", "tests", "testing", "_vendor", "idlelib", "lib2to3"}
_MIN_WORDS = 20
# A literal on a line of its own after a colon, or at the very top. Parsing whole files would find
# a few more, and take ten times as long.
_DOCSTRING = re.compile(r'(?:\A|:[ \t]*(?:#[^\n]*)?\n)\s*([rR]?""".*?""")', re.DOTALL)
# Lists, code, tables, directives and fields; a heading alone or with its text under it.
_NOT_PROSE = re.compile(r"\s|>>>|\.\. |[-*+|#@:] ?|\d+[.)] |[-=~^]{3,}", re.ASCII)
_HEADING = re.compile(r"[\w /-]{1,40}:\s*(\n|$)")


class Docstrings(Corpus):
    """Pairs of a ``document`` and its ``summary`` from docstrings.

    Args:
        min_words: Leave out documents with fewer words (20 is the least there is).
        max_words: Leave out documents with more words.
        min_support: Leave out documents that back up less of their summary: the share of its
            content words that begin, by their first four letters, as one of the document does. At
            0.33 a quarter of the corpus goes; of the documents of 20 to 45 words, a third.
    """

    template = "Summarize in one short sentence:\n\n{document}"

    def __init__(
        self,
        min_words: int = _MIN_WORDS,
        max_words: int | None = None,
        min_support: float = 0.0,
    ) -> None:
        if min_words < _MIN_WORDS or (max_words is not None and max_words < min_words):
            raise ValueError(
                f"Docstrings need {_MIN_WORDS} <= min_words <= max_words; got {min_words} and "
                f"{max_words}."
            )
        if not 0 <= min_support <= 1:
            raise ValueError(f"min_support is a share, between 0 and 1, not {min_support}.")
        self.min_words, self.max_words, self.min_support = min_words, max_words, min_support

    def load(self) -> Dataset:
        """The corpus, columns ``document`` and ``summary``, always in the same order."""
        from datasets import Dataset

        most = sys.maxsize if self.max_words is None else self.max_words
        pairs = [
            pair
            for pair in _corpus().items()
            if self.min_words <= len(pair[0].split()) <= most and support(*pair) >= self.min_support
        ]
        return Dataset.from_dict(
            {"document": [pair[0] for pair in pairs], "summary": [pair[1] for pair in pairs]}
        )


def document_and_summary(docstring: str) -> tuple[str, str] | None:
    r"""Prose after the first paragraph, and the first paragraph; None where either is too short.

    Example:
        >>> text = "Sort the rows by name.\n\n" + "Equal rows keep their order. " * 4
        >>> document_and_summary(text + "\n\nArgs:\n    rows: Any.")[1]
        'Sort the rows by name.'
    """
    first, *others = re.split(r"\n\s*\n", inspect.cleandoc(docstring).strip())
    summary = " ".join(first.split())
    prose: list[str] = []
    for paragraph in others:
        if not _is_prose(paragraph):
            break
        prose.append(" ".join(paragraph.split()))
    document = " ".join(prose)
    if (
        len(first.splitlines()) > 2
        or len(summary.split()) < 3
        or len(document.split()) < _MIN_WORDS
    ):
        return None
    return document, summary


def _is_prose(paragraph: str) -> bool:
    starts_like_a_sentence = re.match(r"[A-Z`'\"(]", paragraph)
    return (
        starts_like_a_sentence is not None
        and not paragraph.endswith(":")  # what it announces is left out
        and not _HEADING.match(paragraph)
        and not any(_NOT_PROSE.match(line) for line in paragraph.splitlines())
    )


@cache
def _corpus() -> dict[str, str]:
    """Document to summary. Equal documents (copied docstrings) count once, the first stays."""
    pairs: dict[str, str] = {}
    with warnings.catch_warnings(action="ignore"):  # other people's backslashes
        for path in _source_files():
            for document, summary in _pairs(path.read_text("utf-8", errors="ignore")):
                pairs.setdefault(document, summary)
    return pairs


def _pairs(source: str) -> Iterator[tuple[str, str]]:
    for literal in _DOCSTRING.findall(source):
        # Cheap tests first: evaluating every literal would take twice as long.
        if "\n\n" in literal and (pair := document_and_summary(_evaluate(literal))):
            yield pair


def _evaluate(literal: str) -> str:
    try:
        return str(ast.literal_eval(literal))
    except (SyntaxError, ValueError):
        return ""  # quotes that do not pair up: no docstring


def _source_files() -> Iterator[Path]:
    roots = [Path(sysconfig.get_path("stdlib"))]
    for name in _PACKAGES:
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            roots.append(Path(spec.submodule_search_locations[0]))
    for root in roots:
        for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
            if not _SKIPPED.intersection(path.relative_to(root).parts):
                yield path
