"""The front: mean rewards per preference, accumulated across devices, and what they say."""

from .bootstrap import Estimate
from .front import Front
from .grid import Grid
from .report import FrontReport
from .samples import FrontSamples

__all__ = ["Estimate", "Front", "FrontReport", "FrontSamples", "Grid"]
