"""SteerablePolicy: the trained dial, to load, use, save and share."""

from .card import base_licence, hub_name
from .policy import SteerablePolicy

__all__ = ["SteerablePolicy", "base_licence", "hub_name"]
