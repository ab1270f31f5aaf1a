"""``plan``: will it fit? The memory of a run by part, before any weight is loaded."""

from .command import plan
from .devices import Gathered, Layout, gathered_bytes, on_each_device
from .ledger import Ledger
from .rehearsal import Load, rehearse

__all__ = [
    "Gathered",
    "Layout",
    "Ledger",
    "Load",
    "gathered_bytes",
    "on_each_device",
    "plan",
    "rehearse",
]
