"""LightningModules."""

from .clp import CLPModule, TrainingDiverged
from .critic import Critic
from .supervised import SupervisedModule

__all__ = ["CLPModule", "Critic", "SupervisedModule", "TrainingDiverged"]
