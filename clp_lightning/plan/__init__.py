"""``plan``: will it fit? The memory of a run by part, before any weight is loaded."""

from .command import plan
from .devices import Layout, gathered_bytes, on_each_device
from .ledger import Ledger
from .rehearsal import Load, rehearse

__all__ = ["Layout", "Ledger", "Load", "gathered_bytes", "on_each_device", "plan", "rehearse"]
