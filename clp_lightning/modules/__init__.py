"""LightningModules."""

from .clp import CLPModule, TrainingDiverged
from .supervised import SupervisedModule

__all__ = ["CLPModule", "SupervisedModule", "TrainingDiverged"]
