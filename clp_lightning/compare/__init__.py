"""``compare``: several runs beside each other, in one table and one figure."""

from .command import compare, compare_fronts

__all__ = ["compare", "compare_fronts"]
