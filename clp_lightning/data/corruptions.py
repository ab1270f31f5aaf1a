"""Ways to make a summary wrong: what a consistency reward learns to tell from the truth."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from heapq import nsmallest
from math import log2

import torch

__all__ = [
    "CORRUPTIONS",
    "Corruption",
    "Summaries",
    "empty",
    "other_summary",
    "shuffled_words",
    "support",
    "swapped_word",
    "swapped_words",
]

# Words that carry a summary's form and not its content.
_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """about above after all also and any are been before being below between both but can
        cannot could did does each either else every few for from given had has have how into its
        itself may might more most much must neither nor not off once one only other otherwise our
        out over own per same shall should since some such than that the their them then there
        these they this those through thus too under until upon use used uses using very via was
        were what when where whether which while who whose why will with within without would you
        your""",
    )
)
_WORD = re.compile(r"\b[^\W\d_]{3,}\b")
_STEM = 4  # words that begin with the same letters, so many of them, are forms of one word
_CHOICE = 20  # the nearest words that one is drawn from


class Summaries:
    """All summaries of a corpus, of which corruptions are made; their order does not matter.

    Args:
        texts: The summaries.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = sorted(set(texts))
        self._similar: dict[str, list[str]] = {}

    @cached_property
    def frequency(self) -> Counter[str]:
        """How often each content word stands in different summaries."""
        return Counter(word[0].lower() for text in self.texts for word in content_words(text))

    @cached_property
    def _by_length(self) -> list[list[tuple[int, str]]]:
        """(frequency, word) of all words of one length, sorted."""
        words: dict[int, list[tuple[int, str]]] = {}
        for word, count in self.frequency.items():
            words.setdefault(len(word), []).append((count, word))
        return [sorted(group) for group in words.values()]

    def similar(self, word: str) -> list[str]:
        """The content words nearest to ``word`` in frequency and length, forms of it left out.

        The distance is the factor between the frequencies, in doublings, plus the difference in
        letters.

        Args:
            word: A content word, in small letters.

        Returns:
            At most 20, the nearest first.
        """
        if word not in self._similar:
            own = self.frequency[word] or 1
            near: list[tuple[float, str]] = []
            for group in self._by_length:
                # Of one length no others can be among the nearest, unless many are forms of it.
                middle = bisect_left(group, (own, word))
                for count, other in group[max(middle - 2 * _CHOICE, 0) : middle + 2 * _CHOICE]:
                    if other[:_STEM] != word[:_STEM]:
                        apart = abs(log2(count / own)) + abs(len(other) - len(word))
                        near.append((apart, other))
            self._similar[word] = [other for _, other in nsmallest(_CHOICE, near)]
        return self._similar[word]


Corruption = Callable[[str, Summaries, torch.Generator], str | None]
"""(summary, all summaries, randomness) -> another text, or None where there is none."""


def content_words(text: str) -> list[re.Match[str]]:
    """Whole words of three letters or more that say something."""
    return [m for m in _WORD.finditer(text) if m[0].lower() not in _FUNCTION_WORDS]


def support(document: str, summary: str) -> float:
    """How much of what a summary says its document says too.

    Returns:
        The share of the summary's content words that begin as a content word of the document
        does, each beginning of four letters counted once; 1 where the summary has none.
    """
    said, wanted = (
        {word[0].lower()[:_STEM] for word in content_words(text)} for text in (document, summary)
    )
    return len(wanted & said) / len(wanted) if wanted else 1.0


def swapped_word(summary: str, summaries: Summaries, draw: torch.Generator) -> str | None:
    """One content word gives way to one of another summary, as frequent and as long."""
    words = content_words(summary)
    present = {word[0].lower() for word in words}
    for index in torch.randperm(len(words), generator=draw).tolist():
        old = words[index]
        choice = [word for word in summaries.similar(old[0].lower()) if word not in present]
        if choice:
            new = _in_case_of(old[0], choice[_below(len(choice), draw)])
            return summary[: old.start()] + new + summary[old.end() :]
    return None


def swapped_words(summary: str, summaries: Summaries, draw: torch.Generator) -> str | None:
    """One to three content words give way, which is easier to see; a head learns one from it."""
    text = summary
    for _ in range(1 + _below(3, draw)):
        changed = swapped_word(text, summaries, draw)
        if changed != summary:  # a word can also be swapped back
            text = changed or text
    return None if text == summary else text


def other_summary(summary: str, summaries: Summaries, draw: torch.Generator) -> str | None:
    """The summary of another document."""
    texts = summaries.texts
    if len(texts) < 2:
        return None
    index = _below(len(texts) - 1, draw)
    return texts[index + (index >= bisect_left(texts, summary))]


def shuffled_words(summary: str, summaries: Summaries, draw: torch.Generator) -> str | None:
    """The same words in another order."""
    words = summary.split()
    if len(set(words)) < 2:
        return None
    while True:
        order = torch.randperm(len(words), generator=draw).tolist()
        if (shuffled := [words[i] for i in order]) != words:
            return " ".join(shuffled)


def empty(summary: str, summaries: Summaries, draw: torch.Generator) -> str:
    """Nothing: a reward that never saw it may like it best, and a policy finds that out."""
    return ""


CORRUPTIONS: dict[str, Corruption] = {
    "swapped_word": swapped_word,
    "other_summary": other_summary,
    "shuffled_words": shuffled_words,
    "empty": empty,
    "swapped_words": swapped_words,
}
"""Every corruption by its name."""


def _below(number: int, draw: torch.Generator) -> int:
    return int(torch.randint(number, (), generator=draw))


def _in_case_of(old: str, new: str) -> str:
    if old.isupper():
        return new.upper()
    return new.capitalize() if old[0].isupper() else new
