"""``judge``: which of two runs a strong language model prefers, side by side."""

from .command import judge, judge_pairs
from .pairs import Pair, read_pairs

__all__ = ["Pair", "judge", "judge_pairs", "read_pairs"]
