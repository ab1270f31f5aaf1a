"""LightningModules."""

from .clp import CLPModule, TrainingDiverged
from .critic import Critic
from .optimizers import MuonAdamW
from .supervised import SupervisedModule

__all__ = ["CLPModule", "Critic", "MuonAdamW", "SupervisedModule", "TrainingDiverged"]
