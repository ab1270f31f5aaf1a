"""SteerablePolicy: the trained dial, to load, use, save and share."""

from .policy import SteerablePolicy

__all__ = ["SteerablePolicy"]
