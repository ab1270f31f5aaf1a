"""The judge: a task small enough that the best steerable policy is known exactly."""

from .base import build_base, task_tokenizer, train_base
from .callback import ExactFrontCallback, exact_rewards
from .curve import curve_report, responses_needed
from .data import ExactDataModule
from .evaluate import enumeration_rollout, exact_gradient, exact_logp, exact_reference_logp
from .hard import HardTask
from .optimum import MAX_ALPHA, closed_gap, exact_value, optimum
from .prompt import ExactPromptText
from .rewards import ExactReward
from .task import ExactTask

__all__ = [
    "MAX_ALPHA",
    "ExactDataModule",
    "ExactFrontCallback",
    "ExactPromptText",
    "ExactReward",
    "ExactTask",
    "HardTask",
    "build_base",
    "closed_gap",
    "curve_report",
    "enumeration_rollout",
    "exact_gradient",
    "exact_logp",
    "exact_reference_logp",
    "exact_rewards",
    "exact_value",
    "optimum",
    "responses_needed",
    "task_tokenizer",
    "train_base",
]
