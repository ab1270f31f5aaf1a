"""A tiny T5 with random weights, and a tokenizer of its own from the docstring corpus.

    python -m benchmarks.tiny_t5.base FOLDER

Nothing of it is pretrained: what it knows of English it learns in the supervised step.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from clp_lightning.data import Docstrings

__all__ = ["build"]

VOCABULARY = 2048
PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"  # T5's own, with its ids 0, 1 and 2


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte pairs, a stop token behind every prompt as T5 has it."""
    core = Tokenizer(models.BPE(unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(True)]
    )
    core.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[PAD, EOS, UNKNOWN], show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, core.token_to_id(EOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN
    )


def build(folder: Path) -> None:
    """Writes model and tokenizer as a plain Hugging Face folder."""
    rows = Docstrings().load()
    tokenizer = train_tokenizer([*rows["document"], *rows["summary"]])
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{folder}: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    build(parser.parse_args().folder)
