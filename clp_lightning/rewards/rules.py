"""Rewards that are a rule: no model, no download."""

from __future__ import annotations

import re
from typing import Any, Literal

import numpy as np

from ..described import check_choice
from ..types import Prompt
from .base import Completion, Reward, completion_text

__all__ = ["Brevity", "Pattern", "Plain", "Rouge"]


class Brevity(Reward):
    """Length against a target, in words.

    1 at ``target``, 0 at ``low`` and ``high``, -1 for an empty completion and from ``longest``
    on; straight lines between.

    Args:
        target: The best number of words.
        low: Fewer words than the target that are worth 0; half the target if None.
        high: More words than the target that are worth 0; twice the target if None.
        longest: So many words are worth -1, as are more; three times the target if None.

    Example:
        >>> Brevity()(["p"] * 3, ["one two three four", "one two three", ""])
        [1.0, 0.5, -1.0]
    """

    def __init__(
        self,
        target: int = 4,
        low: float | None = None,
        high: float | None = None,
        longest: float | None = None,
    ) -> None:
        low = target / 2 if low is None else low
        high = 2 * target if high is None else high
        longest = 3 * target if longest is None else longest
        if not 0 < low < target < high < longest:
            raise ValueError(
                "Brevity needs 0 < low < target < high < longest; got "
                f"{low}, {target}, {high}, {longest}."
            )
        self.knots = [0, low, target, high, longest]

    def __call__(
        self, prompts: list[Prompt], completions: list[Completion], **columns: Any
    ) -> list[float | None]:
        """A number in [-1, 1] per completion."""
        words = [len(completion_text(c).split()) for c in completions]
        return [float(score) for score in np.interp(words, self.knots, [-1, 0, 1, 0, -1])]


class Plain(Reward):
    """Minus the mean number of letters of the distinct words, so that short words score high.

    Distinct, because repeating a small word must not pay. A completion without words gets the
    lowest score.

    Args:
        shortest: Means below this many letters count as this many.
        longest: Means above this many letters count as this many.

    Example:
        >>> Plain()(["p"] * 2, ["A cat sat, a cat.", ""])  # (1 + 3 + 3) / 3 letters, and none
        [-3.0, -9.0]
    """

    def __init__(self, shortest: float = 3.0, longest: float = 9.0) -> None:
        if not 0 < shortest < longest:
            raise ValueError(f"Plain needs 0 < shortest < longest; got {shortest}, {longest}.")
        self.shortest, self.longest = shortest, longest

    def __call__(
        self, prompts: list[Prompt], completions: list[Completion], **columns: Any
    ) -> list[float | None]:
        """A number in [-longest, -shortest] per completion."""
        return [self._score(completion_text(c)) for c in completions]

    def _score(self, text: str) -> float:
        words = set(re.findall(r"[^\W\d_]+", text.lower()))
        letters = sum(map(len, words)) / len(words) if words else self.longest
        return -min(max(letters, self.shortest), self.longest)


class Rouge(Reward):
    """ROUGE against a column of the data (Lin 2004), by the package ``rouge-score``.

    Args:
        reference: Column with the reference text; None there gives no score.
        kind: rouge1, rouge2, rougeL or rougeLsum.
        use_stemmer: Compare word stems.
        measure: ``fmeasure``, ``precision`` or ``recall``: the share of the reference that is in
            the completion, however long.
    """

    def __init__(
        self,
        reference: str = "summary",
        kind: str = "rougeL",
        use_stemmer: bool = False,
        measure: Literal["fmeasure", "precision", "recall"] = "fmeasure",
    ) -> None:
        self.measure = check_choice("measure", measure, ["fmeasure", "precision", "recall"])
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'The Rouge reward needs rouge-score: pip install "clp_lightning[rouge]"'
            ) from error
        if not re.fullmatch(r"rouge([1-9]|L|Lsum)", kind):
            raise ValueError(f"kind '{kind}' is none of rouge1, rouge2, rougeL, rougeLsum.")
        self.required_columns = (reference,)
        self.reference, self.kind = reference, kind
        self.scorer = RougeScorer([kind], use_stemmer=use_stemmer)

    def __call__(
        self, prompts: list[Prompt], completions: list[Completion], **columns: Any
    ) -> list[float | None]:
        """A number in [0, 1] per completion."""
        return [
            None if reference is None else self._score(completion_text(reference), text)
            for reference, text in zip(
                columns[self.reference], map(completion_text, completions), strict=True
            )
        ]

    def _score(self, reference: str, text: str) -> float:
        return float(getattr(self.scorer.score(reference, text)[self.kind], self.measure))


class Pattern(Reward):
    """1 where a regular expression is found in the completion, else 0.

    Args:
        pattern: Python's syntax; ``.`` matches line ends too.

    Example:
        >>> Pattern("^Yes")(["p"] * 2, ["Yes.", "No. Yes."])
        [1.0, 0.0]
    """

    def __init__(self, pattern: str) -> None:
        try:
            self.compiled = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"'{pattern}' is not a regular expression: {error}.") from error

    def __call__(
        self, prompts: list[Prompt], completions: list[Completion], **columns: Any
    ) -> list[float | None]:
        """1.0 or 0.0 per completion."""
        return [float(self.compiled.search(completion_text(c)) is not None) for c in completions]
