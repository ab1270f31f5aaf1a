"""LightningModules."""

from .clp import CLPModule
from .critic import Critic
from .diverged import TrainingDiverged
from .optimizers import MuonAdamW
from .reward import RewardModule
from .supervised import SupervisedModule
from .supervision import ClassLabels, PreferencePairs, ScalarLabels, Supervision

__all__ = [
    "CLPModule",
    "ClassLabels",
    "Critic",
    "MuonAdamW",
    "PreferencePairs",
    "RewardModule",
    "ScalarLabels",
    "SupervisedModule",
    "Supervision",
    "TrainingDiverged",
]
