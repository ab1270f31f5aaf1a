"""How fast a method learns: the closed gap against what was sampled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

__all__ = ["LEVELS", "curve_report", "responses_needed"]

LEVELS = (0.9, 0.95, 0.99)


def responses_needed(responses: Sequence[int], gaps: Sequence[float], level: float) -> int | None:
    """Sampled responses after which the closed gap first reaches ``level``.

    Between two points of the curve the gap is taken as linear in the logarithm of the responses.

    Args:
        responses: Ascending, above 0.
        gaps: The closed gap after each.
        level: What is to be reached.

    Returns:
        None where the curve stays below; the first point's responses where it is there already.

    Example:
        >>> responses_needed([1000, 4000], [0.8, 1.0], 0.9)
        2000
    """
    for i, gap in enumerate(gaps):
        if gap < level:
            continue
        if i == 0:
            return responses[0]
        share = (level - gaps[i - 1]) / (gap - gaps[i - 1])
        step = math.log(responses[i] / responses[i - 1])
        return round(responses[i - 1] * math.exp(share * step))
    return None


def curve_report(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A curve and what it needs for 0.9, 0.95 and 0.99, as plain data.

    Args:
        points: Each {responses, sampled_tokens, seen: {mean, worst}, unseen: the same or None}.

    Returns:
        ``points``, and ``needed``: responses by level, of the mean on seen contexts, None where it
        was not reached.
    """
    responses = [point["responses"] for point in points]
    gaps = [point["seen"]["mean"] for point in points]
    needed = {str(level): responses_needed(responses, gaps, level) for level in LEVELS}
    return {"points": list(points), "needed": needed}
