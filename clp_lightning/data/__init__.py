"""Prompts, in batches whose order and position survive a resume."""

from .collate import RESERVED, PromptFormat, check_columns, collate
from .docstrings import Docstrings
from .pairs import DocstringPairs
from .preferences import RewardDataModule
from .prompts import PromptDataModule, PromptDataset
from .sampler import BatchKey, PromptLoader, PromptSampler

__all__ = [
    "RESERVED",
    "BatchKey",
    "DocstringPairs",
    "Docstrings",
    "PromptDataModule",
    "PromptDataset",
    "PromptFormat",
    "PromptLoader",
    "PromptSampler",
    "RewardDataModule",
    "check_columns",
    "collate",
]
