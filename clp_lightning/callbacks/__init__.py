"""Callbacks: preferences, fronts, samples, predictions."""

from .checkpoint import RunCheckpoint
from .front import FrontCallback
from .plots import plot_front
from .predictions import PredictionsCallback
from .preference import (
    AlphaSampler,
    AnnealedAlpha,
    CLPCallback,
    Dirichlet,
    Fixed,
    FixedAlpha,
    LogUniformAlpha,
    UniformAlpha,
    UniformGrid,
    Vertices,
    WeightSampler,
)
from .samples import SamplesCallback
from .watch import Watchmen

__all__ = [
    "AlphaSampler",
    "AnnealedAlpha",
    "CLPCallback",
    "Dirichlet",
    "Fixed",
    "FixedAlpha",
    "FrontCallback",
    "LogUniformAlpha",
    "PredictionsCallback",
    "RunCheckpoint",
    "SamplesCallback",
    "UniformAlpha",
    "UniformGrid",
    "Vertices",
    "Watchmen",
    "WeightSampler",
    "plot_front",
]
