"""Writes a low-rank adapter as plain PEFT reads it, and reads one back."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from ..tuned import find_adapter

__all__ = ["PEFT_PREFIX", "Factors", "read_adapter", "save_adapter", "stack"]

PEFT_PREFIX = "base_model.model."
"""What PEFT puts in front of the base's own names."""


@dataclass
class Factors:
    """What an adapter adds to one linear layer: ``scale * up @ down``.

    Attributes:
        down: Shape (r, in).
        up: Shape (out, r).
        scale: PEFT's lora_alpha / r.
    """

    down: Tensor
    up: Tensor
    scale: float

    def padded(self, rank: int) -> Factors:
        """The same product with zeros up to ``rank``."""
        missing = rank - len(self.down)
        down, up = F.pad(self.down, (0, 0, 0, missing)), F.pad(self.up, (0, missing))
        return Factors(down, up, self.scale)


def save_adapter(
    folder: Path,
    layers: Mapping[str, Factors],
    *,
    base_name: str,
    revision: str | None,
    is_encoder_decoder: bool,
) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors`` into ``folder``.

    Args:
        folder: Created if need be.
        layers: Factors by the full name of the layer in the base.
        base_name: Where PEFT looks for the base.
        revision: Its revision on the hub.
        is_encoder_decoder: Whether the base is one.
    """
    (rank, scale), _ = Counter((len(f.down), f.scale) for f in layers.values()).most_common(1)[0]
    others = {n: f for n, f in layers.items() if (len(f.down), f.scale) != (rank, scale)}
    config = LoraConfig(
        r=rank,
        lora_alpha=scale * rank,  # type: ignore[arg-type]  # PEFT divides it by r
        target_modules=list(layers),
        rank_pattern={name: len(f.down) for name, f in others.items()},
        alpha_pattern={name: f.scale * len(f.down) for name, f in others.items()},
        lora_dropout=0.0,
        bias="none",
        task_type="SEQ_2_SEQ_LM" if is_encoder_decoder else "CAUSAL_LM",
        base_model_name_or_path=base_name,
        revision=revision,
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    tensors = {}
    for name, factors in layers.items():
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = factors.down.detach().cpu().contiguous()
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = factors.up.detach().cpu().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def read_adapter(name: str) -> dict[str, Factors]:
    """The factors of a saved LoRA by the full name of the layer.

    Args:
        name: A folder or a name on the hub.

    Raises:
        FileNotFoundError: it is nowhere.
        ValueError: it is more than a plain LoRA on linear layers.
    """
    folder = find_adapter(name)
    config = PeftConfig.from_pretrained(str(folder))
    tensors = load_file(folder / "adapter_model.safetensors")
    found: dict[str, Factors] = {}
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        down, up = tensors.pop(key), tensors.pop(key.replace(".lora_A.", ".lora_B."))
        layer = key.removeprefix(PEFT_PREFIX).removesuffix(".lora_A.weight")
        alpha = config.alpha_pattern.get(
            get_pattern_key(config.alpha_pattern.keys(), layer), config.lora_alpha
        )
        rank = math.sqrt(len(down)) if config.use_rslora else len(down)
        found[layer] = Factors(down, up, alpha / rank)
    if tensors or not found:
        raise ValueError(
            f"The adapter '{name}' is more than a plain LoRA on linear layers"
            f"{f' ({min(tensors)})' if tensors else ''}, so it cannot be part of another one. For "
            "plain weights export with --format hf."
        )
    return found


def stack(first: Mapping[str, Factors], second: Mapping[str, Factors]) -> dict[str, Factors]:
    """One adapter that does what two do together: stacked in the rank dimension.

    Layers that only one of them is on are filled up with zeros, because servers want one rank.
    """
    stacked: dict[str, Factors] = {}
    for name in {**first, **second}:
        parts = [factors[name] for factors in (first, second) if name in factors]
        down = torch.cat([part.down.to(parts[-1].down) for part in parts])
        up = torch.cat([(part.up * part.scale).to(parts[-1].up) for part in parts], dim=1)
        stacked[name] = Factors(down, up, 1.0)
    rank = max(len(factors.down) for factors in stacked.values())
    return {name: factors.padded(rank) for name, factors in stacked.items()}
