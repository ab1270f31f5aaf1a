"""Rewards: text to numbers."""

from .bank import RewardBank, Scores
from .base import Completion, Function, Reward, RewardError, completion_text
from .endpoint import Endpoint, NoAnswer
from .heads import ClassifierHead, Head, Support
from .judge import Judge
from .nli import CrossEncoderHead, NLIClassifier, NLITextToText
from .rules import Brevity, Pattern, Plain, Rouge

__all__ = [
    "Brevity",
    "ClassifierHead",
    "Completion",
    "CrossEncoderHead",
    "Endpoint",
    "Function",
    "Head",
    "Judge",
    "NLIClassifier",
    "NLITextToText",
    "NoAnswer",
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
