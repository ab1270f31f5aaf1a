"""The table of docs/howto/devices.md: ``python docs/memory.py`` prints it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from clp_lightning import Brevity, CLPModule, LoRA
from clp_lightning.conditioning import Conditioner, Mixture
from clp_lightning.plan import Layout, Load, gathered_bytes, on_each_device, rehearse
from clp_lightning.plan.rehearsal import PARTS
from clp_lightning.tables import markdown_table

PROMPTS, SAMPLES, PROMPT_TOKENS, NEW_TOKENS, MEMORY = 8, 4, 512, 256, 80
REWARDS = ("a", "b", "c")
# Shapes of published models of the Llama family.
SHAPES: dict[str, dict[str, Any]] = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    | {"tie_word_embeddings": True},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    | {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256},
}
CONDITIONERS: dict[str, type[Conditioner]] = {"LoRA": LoRA, "full": Mixture}


def skeleton(size: str) -> PreTrainedModel:
    """A model without weights, in bfloat16."""
    config = LlamaConfig(**SHAPES[size], max_position_embeddings=4096)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model


def main() -> None:
    """Prints GB on each device at the peak, and the parts of that moment."""
    heads = ["model", "CLP", "devices", *PARTS[:-1], "communication", "total", "fits"]
    print(markdown_table(heads, []), flush=True)
    for name, kind in CONDITIONERS.items():
        for size in SHAPES:
            for devices in (1, 8, 64):
                print(f"| {' | '.join(row(name, kind, size, devices))} |", flush=True)


def row(name: str, kind: type[Conditioner], size: str, devices: int) -> list[str]:
    """What one of ``devices`` holds at the peak, by part; whether it fits."""
    module = CLPModule(
        size,
        kind(),
        {name: Brevity() for name in REWARDS},
        samples_per_prompt=SAMPLES,
        max_new_tokens=NEW_TOKENS,
        gradient_checkpointing=True,
        eval_rows=PROMPTS * SAMPLES,
    )
    load = Load(
        PROMPTS,
        PROMPT_TOKENS,
        one_preference=kind is Mixture,
        foreach=True,
        shard_group=devices,
    )
    alone = rehearse(module, load, skeleton(size))
    found = on_each_device(alone, Layout(devices, devices), gathered_bytes(module.policy))
    parts = max(found.values(), key=lambda each: sum(each.values()))
    total = sum(parts.values()) / 1e9
    cells = [f"{number / 1e9:.1f}" for part, number in parts.items() if part != "rewards"]
    verdict = "yes" if total <= 0.9 * MEMORY else "no"
    return [size, name, str(devices), *cells, f"**{total:.1f}**", verdict]


if __name__ == "__main__":
    main()
