"""The peak of a real run, and what ``plan`` says of it: ``-m tests.plan.measured llama lora``.

In a process of its own, because the kernel's mark of the highest resident memory is the process's.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from clp_lightning import LoRA, PromptDataModule
from clp_lightning.conditioning import Conditioner, Mixture
from clp_lightning.plan import Load, rehearse
from tests.runs import loud, make_module, make_trainer
from tests.tiny import save_tiny

PROMPTS, PROMPT_TOKENS, NEW_TOKENS, SAMPLES = 4, 128, 32, 4
MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 8192,
    },
    "gpt2": {"n_embd": 512, "n_head": 8, "n_layer": 8, "n_positions": 256, "vocab_size": 8192},
    "t5": {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_heads": 8, "num_layers": 6}
    | {"vocab_size": 8192},
}
CONDITIONERS: dict[str, type[Conditioner]] = {"lora": LoRA, "full": Mixture, "attention": Mixture}


class Mark(Callback):
    """Reads the highest resident memory of all steps but the first."""

    peak = 0

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 1:  # the optimizer has its state
            settle()
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to what is resident now

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.peak = status("VmHWM")


def settle() -> None:
    """Gives freed memory back to the kernel."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def conditioner(name: str) -> Conditioner:
    """One of ``CONDITIONERS``."""
    return LoRA() if name == "lora" else Mixture(name)


def main(kind: str, conditioned: str) -> None:
    """Prints bytes at the peak, measured and planned."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # Weights so small that hardly a response ends before its limit.
        small = {"initializer_factor": 0.05} if kind == "t5" else {"initializer_range": 0.02}
        base = save_tiny(folder / "base", kind, **MODELS[kind], **small)
        letters = PROMPT_TOKENS - (kind == "t5")
        rows = [json.dumps({"prompt": chr(97 + i) * letters}) for i in range(16)]
        (folder / "rows.jsonl").write_text("\n".join(rows))

        def module(base: Path) -> Any:
            return make_module(
                base,
                conditioner=conditioner(conditioned),
                rewards={"loud": loud, "more": loud},
                samples_per_prompt=SAMPLES,
                max_new_tokens=NEW_TOKENS,
                max_prompt_tokens=PROMPT_TOKENS,
                statistics_prompts=0,
            )

        data = PromptDataModule(str(folder / "rows.jsonl"), holdout=0, batch_size=PROMPTS, seed=0)
        mark = Mark()
        # A small run loads whatever is loaded late: kernels, threads, file formats.
        make_trainer(folder, max_steps=1).fit(module(save_tiny(folder / "tiny", kind)), data)
        settle()
        before = status("VmRSS")
        trained = module(base)
        make_trainer(folder, mark, max_steps=3).fit(trained, data)
        load = Load(PROMPTS, PROMPT_TOKENS, one_preference=conditioned != "lora")
        phases = rehearse(module(base), load)
    planned = max(sum(phases[phase].values()) for phase in ("sampling", "gradient", "update"))
    print(json.dumps({"measured": mark.peak - before, "planned": planned, "phases": phases}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
