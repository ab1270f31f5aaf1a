"""Prompts, in batches whose order and position survive a resume."""

from .collate import RESERVED, PromptFormat, check_columns, collate
from .corpus import Corpus
from .corrupted import CorruptedSummaries
from .docstrings import Docstrings
from .pairs import DocstringPairs
from .preferences import RewardDataModule
from .prompts import PromptDataModule, PromptDataset
from .sampler import BatchKey, PromptLoader, PromptSampler

__all__ = [
    "RESERVED",
    "BatchKey",
    "Corpus",
    "CorruptedSummaries",
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
