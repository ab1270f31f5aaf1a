"""Writes a low-rank adapter as plain PEFT reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

__all__ = ["PEFT_PREFIX", "Factors", "save_adapter"]

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
