"""The reference of an exact task: a two-layer model over its tokens, saved as a plain folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ..keyed import generator
from .task import ExactTask

__all__ = ["build_base", "task_tokenizer", "train_base"]

MARKER = "task.json"
HIDDEN, LAYERS, HEADS = 64, 2, 4
NUM_STEPS, BATCH_SIZE, LR = 400, 64, 3e-3
MAX_PREFIX = 16  # tokens that prompt-CLP may write before a context
SAMPLES = 3  # purpose of the random stream, beside those of task.py


def task_tokenizer(task: ExactTask) -> PreTrainedTokenizerFast:
    """One word a token, ids 0 .. V-1 and no others; padding is one of them."""
    model = WordLevel({token: i for i, token in enumerate(task.tokens)}, unk_token=task.tokens[0])
    backend = Tokenizer(model)
    backend.pre_tokenizer = WhitespaceSplit()
    stop = None if task.stop_id is None else task.tokens[task.stop_id]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=task.tokens[task.pad_id], eos_token=stop
    )


def base_config(task: ExactTask) -> PretrainedConfig:
    """A Llama; where positions must be absolute, a GPT-2 of the same size."""
    longest = MAX_PREFIX + task.contexts.shape[1] + task.length
    special: dict[str, Any] = {
        "bos_token_id": None,
        "eos_token_id": task.stop_id,
        "pad_token_id": task.pad_id,
    }
    if task.absolute_positions:
        return GPT2Config(
            vocab_size=task.num_tokens,
            n_positions=longest,
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=HEADS,
            n_inner=2 * HIDDEN,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=False,
            **special,
        )
    return LlamaConfig(
        vocab_size=task.num_tokens,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=longest,
        tie_word_embeddings=False,
        **special,
    )


def train_base(task: ExactTask) -> PreTrainedModel:
    """Fits the model to the task's Markov chains; the same weights for the same task.

    400 Adam steps on the cross-entropy to the chain's own next-token distributions (not to
    sampled tokens, which would only add noise), at prefixes sampled from the chain.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(task.task_seed)
        model = AutoModelForCausalLM.from_config(base_config(task))
    # The padding's embedding is an ordinary token's here: it is trained, and starts like others.
    model.get_input_embeddings().padding_idx = None
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, NUM_STEPS)
    draw = generator(task.task_seed, SAMPLES)
    for _ in range(NUM_STEPS):
        context, ids, mask = _sample_chain(task, draw)
        inputs = torch.cat([task.contexts[context], ids[:, :-1]], dim=-1)
        logp = model(input_ids=inputs).logits[:, -task.length :].log_softmax(-1)  # (B, T, V)
        first, then = task.chain
        target = torch.cat([first[context, None], then[context[:, None], ids[:, :-1]]], dim=1)
        loss = -((target.exp() * logp).sum(-1) * mask).sum() / BATCH_SIZE
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def build_base(task: ExactTask, folder: str | Path) -> Path:
    """Writes model, tokenizer and ``task.json`` to ``folder``, unless this task's are there.

    Returns:
        The folder.

    Raises:
        ValueError: where ``folder`` holds something else.
    """
    folder = Path(folder)
    if _holds(task, folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Built aside and renamed, so that a killed run leaves no half of a base behind.
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        train_base(task).save_pretrained(scratch)
        task_tokenizer(task).save_pretrained(scratch)
        (scratch / MARKER).write_text(json.dumps(_identity(task.arguments()), indent=1) + "\n")
        scratch.chmod(0o755)
        os.replace(scratch, folder)
    except OSError:
        if not _holds(task, folder):  # another process may have been faster
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _holds(task: ExactTask, folder: Path) -> bool:
    """Whether ``folder`` holds the base of ``task``; False where it is missing or empty."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    files = folder / MARKER, folder / "config.json"
    if all(file.is_file() for file in files):
        arguments, config = (json.loads(file.read_text()) for file in files)
        kind = config.get("model_type") == base_config(task).model_type
        if kind and _identity(arguments) == _identity(task.arguments()):
            return True
    raise ValueError(f"'{folder}' does not hold the base of {task}; choose another folder.")


def _identity(arguments: dict[str, Any]) -> dict[str, Any]:
    """What the base depends on: rewards do not reach it."""
    return {k: v for k, v in arguments.items() if k not in ("num_rewards", "correlation")}


def _sample_chain(task: ExactTask, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Contexts (B,), response ids (B, T) and mask (B, T), drawn from the chains."""
    context = torch.randint(task.num_contexts, (BATCH_SIZE,), generator=draw)
    flat = torch.multinomial(
        task.chain_logp.exp(), BATCH_SIZE, replacement=True, generator=draw
    )  # (X, B): a column for every sample, of which its own context's row is used
    row = flat[context, torch.arange(BATCH_SIZE)]
    return context, task.responses[row], task.response_mask[row]
