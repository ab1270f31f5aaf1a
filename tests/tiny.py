"""Tiny random models and tokenizers, saved as plain Hugging Face folders.

Two layers, one token per character, a fixed seed, and weights large enough that the logits are
far from flat. ``tests/conftest.py`` offers ``tiny_folder`` as a fixture.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

SPECIALS = ["<pad>", "<eos>", "<unk>", "<|start|>", "<|end|>"]
PAD, EOS, UNK, START, END = range(len(SPECIALS))
VOCABULARY = [*SPECIALS, "\n", *map(chr, range(32, 127))]

# Like SmolLM2's: a built-in system turn that a system message replaces.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|start|>system\nHelp.<|end|>\n{% endif %}"
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)

_COMMON: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "pad_token_id": PAD,
    "bos_token_id": EOS,
    "eos_token_id": EOS,
}
_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
_WITHOUT_HEAD_DIM = {name: value for name, value in _LLAMA.items() if name != "head_dim"}
_T5: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "initializer_factor": 1.5,
    "decoder_start_token_id": PAD,
}
_KINDS: dict[str, tuple[type[PreTrainedModel], type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, _LLAMA),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, _LLAMA),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        _LLAMA
        | {
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 8,
            "tie_word_embeddings": True,
        },
    ),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config,
        {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 256, "initializer_range": 0.3},
    ),
    "t5": (T5ForConditionalGeneration, T5Config, _T5 | {"tie_word_embeddings": True}),
    "t5_v1_1": (
        T5ForConditionalGeneration,
        T5Config,
        _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "doge": (DogeForCausalLM, DogeConfig, _LLAMA),
    "deepseek": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        _WITHOUT_HEAD_DIM
        | {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "lfm2": (
        Lfm2ForCausalLM,
        Lfm2Config,
        _WITHOUT_HEAD_DIM | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    ),
    "qwen3_5": (
        Qwen3_5ForCausalLM,
        Qwen3_5TextConfig,
        _LLAMA
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    ),
}
DECODERS = ["llama", "qwen3", "gemma3", "gpt2"]
ENCODER_DECODERS = ["t5", "t5_v1_1"]
KINDS = [*DECODERS, *ENCODER_DECODERS]
"""Names that ``tiny_model`` and ``tiny_folder`` take; ``RECURRENT`` has more."""
RECURRENT = ["lfm2", "qwen3_5"]
"""Some of their layers keep a state that every token overwrites."""
OWN_ATTENTION = ["doge", "deepseek"]
"""Their attention adds to the scores, or caches something else than keys and values."""


def tiny_tokenizer(*, chat: bool = False, pad: bool = True) -> PreTrainedTokenizerFast:
    """One token per printable ASCII character; everything else is ``<unk>``.

    Args:
        chat: With a chat template that closes every turn by ``<|end|>``.
        pad: With a pad token; without one, loading must find another.
    """
    core = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        eos_token="<eos>",
        extra_special_tokens=["<|start|>", "<|end|>"],
        model_input_names=["input_ids", "attention_mask"],
        **({"pad_token": "<pad>"} if pad else {}),
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(kind: str, **overrides: Any) -> PreTrainedModel:
    """A random model of ``kind`` (see ``KINDS``) in eval mode; the same weights at every call.

    Args:
        kind: Architecture.
        **overrides: Fields of its configuration.
    """
    model_class, config_class, settings = _KINDS[kind]
    config = config_class(**(_COMMON | settings | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
        if kind == "t5_v1_1":  # Transformers ties even this, unless its file holds both tables
            head = torch.randn_like(model.lm_head.weight) * config.d_model**-0.5
            model.lm_head.weight = torch.nn.Parameter(head)
        # Norm scales and biases start at 1 and 0, where mistakes in them would not be seen.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def save_tiny(
    folder: Path,
    kind: str,
    *,
    chat: bool = False,
    pad: bool = True,
    generation: dict[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """Writes model and tokenizer into ``folder``.

    Args:
        folder: Where to.
        kind: Architecture.
        chat: With a chat template; ``<|end|>`` is then a second stop id.
        pad: With a pad token.
        generation: Fields of generation_config.json, for example ``{"top_k": 3}``.
        **overrides: Fields of the model's configuration.
    """
    model = tiny_model(kind, **overrides)
    settings = ({"eos_token_id": [EOS, END]} if chat else {}) | (generation or {})
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    tiny_tokenizer(chat=chat, pad=pad).save_pretrained(folder)
    return folder
