"""One language model that can be steered between several rewards at inference time.

Names are imported when they are first used, because torch, Lightning and PEFT take seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "AlphaSampler": "callbacks",
    "AnnealedAlpha": "callbacks",
    "Brevity": "rewards",
    "CLPCallback": "callbacks",
    "CLPModule": "modules",
    "ClassLabels": "modules",
    "ClassifierHead": "rewards",
    "Coefficients": "conditioning",
    "Conditioner": "conditioning",
    "CorruptedSummaries": "data",
    "Critic": "modules",
    "CrossEncoderHead": "rewards",
    "DeRa": "policy",
    "Described": "described",
    "Dirichlet": "callbacks",
    "DocstringPairs": "data",
    "Docstrings": "data",
    "Encoding": "policy",
    "Endpoint": "rewards",
    "Engine": "policy",
    "ExactDataModule": "exact",
    "ExactFrontCallback": "exact",
    "ExactPromptText": "exact",
    "ExactReward": "exact",
    "ExactTask": "exact",
    "Fixed": "callbacks",
    "FixedAlpha": "callbacks",
    "Front": "metrics",
    "FrontCallback": "callbacks",
    "Function": "rewards",
    "Gate": "conditioning",
    "Grid": "metrics",
    "HardTask": "exact",
    "Judge": "rewards",
    "LoRA": "conditioning",
    "LogUniformAlpha": "callbacks",
    "MOD": "policy",
    "Mixture": "conditioning",
    "MuonAdamW": "modules",
    "NLIClassifier": "rewards",
    "NLITextToText": "rewards",
    "Pattern": "rewards",
    "Plain": "rewards",
    "Policy": "policy",
    "PredictionsCallback": "callbacks",
    "Preference": "types",
    "PreferencePairs": "modules",
    "Pretrained": "pretrained",
    "PromptText": "conditioning",
    "PromptBatch": "types",
    "PromptDataModule": "data",
    "Reward": "rewards",
    "RewardBank": "rewards",
    "RewardDataModule": "data",
    "RewardError": "rewards",
    "RewardModule": "modules",
    "Rollout": "types",
    "RunCheckpoint": "callbacks",
    "Rouge": "rewards",
    "SamplesCallback": "callbacks",
    "Sampling": "policy",
    "ScalarLabels": "modules",
    "Scaled": "conditioning",
    "SupervisedModule": "modules",
    "SoftPrompt": "conditioning",
    "SteerablePolicy": "steerable",
    "Support": "rewards",
    "Supervision": "modules",
    "TrainingDiverged": "modules",
    "TransformersEngine": "policy",
    "UniformAlpha": "callbacks",
    "UniformGrid": "callbacks",
    "Vertices": "callbacks",
    "Watchmen": "callbacks",
    "WeightSampler": "callbacks",
    "Weights": "conditioning",
    "completion_text": "rewards",
    "plot_front": "callbacks",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'clp_lightning' has no attribute '{name}'")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
