"""What every test shares: no network, one thread, a cache of its own, tiny models on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before any Hugging Face import, which read them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests.tiny import save_tiny

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _clean_environment() -> Iterator[None]:
    """No test leaves a seed (``seed_everything`` does) or a process group for the next one.

    Processes that are forked later would inherit the group, and wait for nobody.
    """
    kept = os.environ.get("PL_GLOBAL_SEED")
    yield
    os.environ.pop("PL_GLOBAL_SEED", None)
    if kept is not None:
        os.environ["PL_GLOBAL_SEED"] = kept
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_folder("llama", chat=True, num_hidden_layers=1)``: see ``tests.tiny.save_tiny``.

    Equal arguments give the same folder: read it, do not write into it.
    """
    root = tmp_path_factory.mktemp("tiny")
    made: dict[str, Path] = {}

    def make(kind: str = "llama", **options: Any) -> Path:
        key = json.dumps([kind, options], sort_keys=True)
        if key not in made:
            made[key] = save_tiny(root / f"{kind}-{len(made)}", kind, **options)
        return made[key]

    return make
