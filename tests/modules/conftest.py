from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from clp_lightning import Pretrained
from tests.tiny import EOS


@pytest.fixture
def base(tiny_folder: Callable[..., Path]) -> Pretrained:
    """Double precision, so that what must be equal is; every third token ends a response.

    GPT-2, because Llama's norms compute in single precision whatever the weights are.
    """
    stop = [EOS, *range(68, 102)]
    folder = tiny_folder("gpt2", generation={"eos_token_id": stop})
    return Pretrained(str(folder), dtype="float64")
