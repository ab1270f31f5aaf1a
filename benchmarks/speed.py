"""What the speed benchmarks share: models and prompts of given sizes, the clock, options.

Responses all have the same length on every side: the tokenizer's end-of-sequence token stands one
place behind the model's output layer, so nobody can sample it, and everybody still looks for it.
Weights are random; the time does not depend on them.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)


@dataclass(frozen=True)
class Size:
    """A model and the work of one step.

    Attributes:
        fields: Of the model's configuration; with ``d_model`` it is a T5, else a Llama.
        prompts: Prompts a step.
        samples: Responses to each.
        prompt_tokens: Length of every prompt.
        new_tokens: Length of every response.
        num_rewards: K.
        lora_rank: Train LoRA adapters of this rank; 0 trains the whole model.
        target: How many of our steps TRL's RLOO should take the time of.
    """

    fields: dict[str, int]
    prompts: int = 8
    samples: int = 4
    prompt_tokens: int = 32
    new_tokens: int = 32
    num_rewards: int = 2
    lora_rank: int = 0
    target: float = 0

    @property
    def seq2seq(self) -> bool:
        """Whether the model is a T5."""
        return "d_model" in self.fields

    @property
    def responses(self) -> int:
        """Responses a step."""
        return self.prompts * self.samples

    @property
    def tokens(self) -> int:
        """Response tokens that a step samples and trains on."""
        return self.responses * self.new_tokens


def llama(
    vocabulary: int, width: int, inner: int, layers: int, heads: int, kv: int
) -> dict[str, int]:
    """Fields of a Llama's configuration."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
    }


SMOLLM2 = llama(49152, 576, 1536, 30, 9, 3) | {"tie_word_embeddings": True}
T5_TINY = {
    "vocab_size": 8192,
    "d_model": 256,
    "d_kv": 64,
    "d_ff": 1024,
    "num_layers": 4,
    "num_heads": 4,
}
SIZES = {
    "10m": Size(llama(8192, 256, 688, 8, 4, 4), target=4),
    "smollm2-lora": Size(SMOLLM2, 4, 4, num_rewards=3, lora_rank=8, target=3),
    "0.5b": Size(llama(49152, 1280, 3456, 24, 20, 4), 8, 4, 128, 128),  # for GPUs
    "t5-tiny": Size(T5_TINY, lora_rank=8),
    "tiny": Size(llama(64, 32, 64, 2, 4, 2), 2, 2, 4, 4),  # for the smoke test
}
# Other engines for our rollouts, by name.
ENGINES: dict[str, dict[str, Any]] = {
    "compiled": {"compile": True},
    "bf16": {"precision": "bf16"},
    "compiled-bf16": {"compile": True, "precision": "bf16"},
}


def save_model(folder: Path, size: Size) -> Path:
    """Writes a random model and its tokenizer of one token per word into ``folder``."""
    vocabulary = size.fields["vocab_size"]
    words = {"<pad>": 0, "<unk>": 1} | {f"w{i}": i for i in range(2, vocabulary)}
    words["<never>"] = vocabulary
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<never>",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": vocabulary}
    torch.manual_seed(0)
    model: Any
    if size.seq2seq:
        model = T5ForConditionalGeneration(
            T5Config(**size.fields, **special, decoder_start_token_id=0)
        )
    else:
        positions = {"max_position_embeddings": 8192}
        model = LlamaForCausalLM(LlamaConfig(**size.fields, **special, **positions))
    model.save_pretrained(folder)
    return folder


def prompt_rows(size: Size, count: int = 64) -> Dataset:
    """Prompts of ``prompt_tokens`` random words."""
    draw = random.Random(0)
    highest = size.fields["vocab_size"] - 1
    rows = [
        [f"w{draw.randint(2, highest)}" for _ in range(size.prompt_tokens)] for _ in range(count)
    ]
    return Dataset.from_list([{"prompt": " ".join(row)} for row in rows])


def rewards(count: int) -> dict[str, Callable[..., list[float]]]:
    """``count`` python functions: how often a word of the response ends with a given digit."""

    def make(digit: str) -> Callable[..., list[float]]:
        def score(completions: list[str], **_: Any) -> list[float]:
            return [float(sum(w.endswith(digit) for w in text.split())) for text in completions]

        score.__name__ = f"digit_{digit}"
        return score

    return {f"digit_{i}": make(str(i)) for i in range(count)}


@dataclass(frozen=True)
class Machine:
    """Where the work is done and how its time is taken.

    Attributes:
        device: ``cpu`` or ``cuda``.
        clock: ``wall``, or ``cpu``: seconds of this process on a processor, which with one thread
            (OMP_NUM_THREADS=1) mean the same, and on a busy machine something.
    """

    device: str
    clock: str = "wall"

    @property
    def precision(self) -> Any:
        """Of both sides, as Lightning calls it, unless TRL's defaults are asked for."""
        return "bf16-mixed" if self.device == "cuda" else "32-true"

    def autocast(self) -> torch.autocast:
        """For work outside a trainer: what ``precision`` stands for."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda")

    def read_rate(self, gigabytes: float = 1.0) -> float:
        """GB/s at which memory is read, by the best of some sums over so much of it."""
        numbers = torch.ones(int(gigabytes * 2**28), device=self.device)
        took = []
        for _ in range(5):
            start = self.now()
            numbers.sum()
            took.append(self.now() - start)
        return 4e-9 * len(numbers) / min(took)

    def now(self) -> float:
        """Seconds, when all that was asked for is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() if self.clock == "wall" else time.process_time()


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all speed benchmarks share."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--size", choices=SIZES, default="10m")
    result.add_argument("--prompt-tokens", type=int, help="in the place of the size's")
    result.add_argument("--new-tokens", type=int, help="in the place of the size's")
    result.add_argument("--rounds", type=int, default=10)
    result.add_argument("--warmup", type=int, default=2)
    result.add_argument("--device", choices=["cpu", "cuda"])
    result.add_argument("--clock", choices=["wall", "cpu"], default="wall", help=Machine.__doc__)
    return result


def add_engines(parser: argparse.ArgumentParser) -> None:
    """The option that has our side run again with other engines."""
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=[], help="run them too")


def chosen_size(args: argparse.Namespace) -> Size:
    """``--size``, with prompts and responses of the lengths asked for."""
    given = {"prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens}
    return dataclasses.replace(SIZES[args.size], **{name: n for name, n in given.items() if n})


def choose_machine(args: argparse.Namespace) -> Machine:
    """As asked for, or the GPU where there is one; prints it, with what else times depend on."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    machine = Machine(device, args.clock)
    where = (
        torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    )
    libraries = [torch, transformers, lightning]
    versions = ", ".join(f"{library.__name__} {library.__version__}" for library in libraries)
    print(f"{device}, {where}, {machine.precision}, {machine.clock} clock; {versions}")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # advice about speed, and deprecations in TRL
    return machine
