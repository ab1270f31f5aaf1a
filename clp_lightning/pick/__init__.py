"""``pick``: the preference of a trained dial that gives what is wanted."""

from .command import pick
from .measure import Measured, Meter
from .search import Wish, find_preference

__all__ = ["Measured", "Meter", "Wish", "find_preference", "pick"]
