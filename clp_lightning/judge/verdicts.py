"""Asking for verdicts in both orders, and what they come to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..metrics.bootstrap import Estimate, cluster_means, resample_counts
from ..rewards import Endpoint, NoAnswer
from ..rewards.rubric import as_text, fill, read_answer
from .pairs import Pair

__all__ = ["Outcome", "ask_both_orders", "summarize"]

Verdict = Literal["a", "b", "tie"]
_TIE = 0.5


@dataclass
class Outcome:
    """What the judge says of a pair.

    Attributes:
        pair: The two responses.
        orders: Its verdict with the first run's response shown as A, and with it shown as B; None
            where the responses are equal, which is a tie without asking.
    """

    pair: Pair
    orders: tuple[Verdict, Verdict] | None

    @property
    def agrees(self) -> bool:
        """Whether both orders say the same of the responses."""
        return self.orders in (None, ("a", "b"), ("b", "a"), ("tie", "tie"))

    @property
    def win(self) -> float:
        """1 where the first run's response is better in both orders, 0 where it is worse; else 0.5.

        Example:
            >>> pair = Pair(0, 0, ((), 0.1), "?", "x", "y")
            >>> [Outcome(pair, o).win for o in [("a", "b"), ("b", "a"), ("a", "a"), ("a", "tie")]]
            [1.0, 0.0, 0.5, 0.5]
        """
        return {("a", "b"): 1.0, ("b", "a"): 0.0}.get(self.orders or ("tie", "tie"), _TIE)


async def ask_both_orders(
    pairs: Sequence[Pair], endpoint: Endpoint, rubric: str, pattern: re.Pattern[str]
) -> list[Outcome | NoAnswer]:
    """The outcome of every pair, or why it has none."""
    asked = [pair for pair in pairs if pair.first != pair.second]
    questions: list[str] = []
    for pair in asked:
        for a, b in ((pair.first, pair.second), (pair.second, pair.first)):
            questions.append(fill(rubric, {"prompt": as_text(pair.prompt), "a": a, "b": b}))

    def read(answer: str) -> Verdict:
        return read_answer(answer, pattern, _verdict)

    answers = iter(await endpoint.ask(questions, read))
    outcomes: list[Outcome | NoAnswer] = []
    for pair in pairs:
        if pair.first == pair.second:
            outcomes.append(Outcome(pair, None))
            continue
        shown_as_a, shown_as_b = next(answers), next(answers)
        if isinstance(shown_as_a, NoAnswer):
            outcomes.append(shown_as_a)
        elif isinstance(shown_as_b, NoAnswer):
            outcomes.append(shown_as_b)
        else:
            outcomes.append(Outcome(pair, (shown_as_a, shown_as_b)))
    return outcomes


def _verdict(text: str) -> Verdict:
    verdicts: dict[str, Verdict] = {"a": "a", "b": "b", "tie": "tie"}
    if (said := text.strip().casefold()) not in verdicts:
        raise ValueError(f"{text!r} is none of A, B and tie")
    return verdicts[said]


def summarize(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Win rates with intervals, over all pairs and by preference.

    A rate is the mean over the pairs of a prompt first, then over prompts, ties counting one half;
    its interval is a bootstrap over prompts.

    Args:
        outcomes: At least one.

    Returns:
        Plain data; None is undefined.
    """
    preferences = sorted({outcome.pair.preference for outcome in outcomes})
    groups = [list(outcomes)]
    groups += [[o for o in outcomes if o.pair.preference == p] for p in preferences]
    estimates = _win_rates(groups)
    points = [
        {"weights": dict(weights), "alpha": alpha, **_counts(group), "win_rate": asdict(estimate)}
        for (weights, alpha), group, estimate in zip(
            preferences, groups[1:], estimates[1:], strict=True
        )
    ]
    return _counts(groups[0]) | {"win_rate": asdict(estimates[0]), "points": points}


def _win_rates(groups: Sequence[Sequence[Outcome]]) -> list[Estimate]:
    """Of each group, under the same resamples of the prompts of the first, which has them all."""
    ids = sorted({outcome.pair.prompt_id for outcome in groups[0]})
    row = {prompt_id: i for i, prompt_id in enumerate(ids)}
    total, number = (torch.zeros(len(ids), len(groups), dtype=torch.float64) for _ in range(2))
    for column, group in enumerate(groups):
        for outcome in group:
            total[row[outcome.pair.prompt_id], column] += outcome.win
            number[row[outcome.pair.prompt_id], column] += 1
    cells: Tensor = total / number  # 0 / 0 is NaN: no pair of the prompt
    means = cluster_means(cells, resample_counts(len(ids)))
    prompts = (number > 0).sum(0).tolist()
    return [Estimate.of(column, n) for column, n in zip(means.unbind(-1), prompts, strict=True)]


def _counts(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    wins = [outcome.win for outcome in outcomes]
    said = [verdict for outcome in outcomes for verdict in outcome.orders or ()]
    decided = [verdict for verdict in said if verdict != "tie"]
    return {
        "prompts": len({outcome.pair.prompt_id for outcome in outcomes}),
        "pairs": len(outcomes),
        "wins": wins.count(1.0),
        "losses": wins.count(0.0),
        "ties": wins.count(_TIE),
        "identical": sum(outcome.orders is None for outcome in outcomes),
        "orders_disagree": sum(not outcome.agrees for outcome in outcomes),
        # One half, if the judge does not care which is shown first.
        "preferred_a": decided.count("a") / len(decided) if decided else None,
        "words": {
            "first": _mean_words([outcome.pair.first for outcome in outcomes]),
            "second": _mean_words([outcome.pair.second for outcome in outcomes]),
        },
    }


def _mean_words(texts: Sequence[str]) -> float:
    return sum(len(text.split()) for text in texts) / len(texts)
