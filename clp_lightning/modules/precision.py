"""What is trained stays in full precision, whatever the Trainer's ``precision`` does to the rest.

Lightning's ``bf16-true`` and ``16-true`` make half precision the default for new tensors and
convert whole modules. Small updates would vanish in it, and position tables be wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["check_quantised", "exact_tensors_kept", "float32_by_default"]

_HALF = (torch.float16, torch.bfloat16)


@contextmanager
def float32_by_default() -> Iterator[None]:
    """New tensors are float32 inside the block, unless they say otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def exact_tensors_kept(module: nn.Module, frozen: bool = False) -> Iterator[None]:
    """Undoes what a conversion inside the block does to trained parameters and to buffers.

    They still move to another device.

    Args:
        module: What is converted.
        frozen: Keep frozen parameters as well.
    """
    kept = [(p, p.data) for p in module.parameters() if frozen or p.requires_grad]
    buffers = [
        (owner, name, buffer)
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False)
    ]
    yield
    for parameter, data in kept:
        if parameter.dtype in _HALF:
            parameter.data = data.to(parameter.device)
    for owner, name, buffer in buffers:  # which a conversion replaces
        converted = owner.get_buffer(name)
        if converted.dtype in _HALF:
            owner._buffers[name] = buffer.to(converted.device)


def check_quantised(model: nn.Module) -> None:
    """Refuses to train around quantised weights on the CPU.

    There bitsandbytes packs its weights anew in the first forward in eval mode, and gradients that
    pass through them afterwards are wrong.

    Raises:
        ValueError: says what to do instead.
    """
    found = [p for p in model.parameters() if type(p).__module__.startswith("bitsandbytes")]
    if any(p.device.type == "cpu" for p in found):
        raise ValueError(
            "A base quantised by bitsandbytes has wrong gradients on the CPU; train it on a GPU, "
            "or leave quantization_config out (`dtype: bfloat16` halves the memory)."
        )
