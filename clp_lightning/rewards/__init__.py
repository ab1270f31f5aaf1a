"""Rewards: text to numbers."""

from .bank import RewardBank, Scores
from .base import Completion, Function, Reward, RewardError, completion_text
from .heads import ClassifierHead, Head, Support
from .nli import NLIClassifier, NLITextToText
from .rules import Brevity, Pattern, Plain, Rouge

__all__ = [
    "Brevity",
    "ClassifierHead",
    "Completion",
    "Function",
    "Head",
    "NLIClassifier",
    "NLITextToText",
    "Pattern",
    "Plain",
    "Reward",
    "RewardBank",
    "RewardError",
    "Rouge",
    "Scores",
    "Support",
    "completion_text",
]
