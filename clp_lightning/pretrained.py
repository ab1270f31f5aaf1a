"""Find and load a model or a tokenizer: from a folder, an installed package, or the hub.

Whatever the source, weights are read from safetensors (or once from GGUF), never unpickled, and
nothing is loaded before it is asked for.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .attempts import attempt
from .intact import check_finite_weights, check_weight_files, loaded
from .sources import (
    convert_gguf,
    find_model,
    gguf_file,
    require_gguf_readers,
    weight_files,
    weights_digest,
)
from .tuned import adapter_digest, find_adapter, merge_adapter

__all__ = [
    "Pretrained",
    "as_pretrained",
    "check_available",
    "fingerprint",
    "load_config",
    "load_model",
    "load_skeleton",
    "load_tokenizer",
    "locate",
    "stop_ids",
]


@dataclass
class Pretrained:
    """Which model, and how to load it.

    Args:
        name: A folder, an installed package that carries a model, or a name on the hub; looked
            for in this order.
        revision: Branch, tag or commit on the hub.
        dtype: Floating-point type of the loaded weights, for example float32 or bfloat16.
        attn_implementation: Attention kernel, for example sdpa or eager; None leaves the choice
            to Transformers.
        quantization_config: Quantisation on loading, as Transformers writes it:
            ``{quant_method: bitsandbytes, load_in_4bit: true}``.
        trust_remote_code: Run Python code that comes with the model. Read it first.
        adapter: A LoRA that the model was tuned with, as PEFT saves it: a folder or a name on the
            hub. It is merged on loading, so the reference is the tuned model.
    """

    name: str
    revision: str | None = None
    dtype: str = "float32"
    attn_implementation: str | None = None
    quantization_config: dict[str, Any] | None = None
    trust_remote_code: bool = False
    adapter: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, (str, os.PathLike)):
            raise ValueError(
                f"The name of a pretrained model is a {type(self.name).__name__}; give a folder, "
                "an installed package or a name on the hub."
            )
        self.name = os.fspath(self.name)
        self.dtype = str(self.dtype).removeprefix("torch.")  # torch.bfloat16 says it as well
        if not self.name:
            raise ValueError("The name of a pretrained model is empty: give a folder or a name.")
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(
                f"dtype '{self.dtype}' of '{self.name}' is not a floating-point type of torch: "
                "use float32, bfloat16, float16 or float64."
            )
        if self.adapter is not None:
            self.adapter = os.fspath(self.adapter)
            if self.quantization_config is not None:
                raise ValueError(
                    f"The adapter '{self.adapter}' cannot be merged exactly into a quantised base. "
                    "Merge it first (PEFT's merge_and_unload), or leave quantization_config out."
                )


def as_pretrained(spec: str | Path | Mapping[str, Any] | Pretrained) -> Pretrained:
    """``spec`` itself, or the ``Pretrained`` of a bare name or of a mapping of its fields.

    Example:
        >>> as_pretrained("gpt2").dtype
        'float32'
    """
    if isinstance(spec, Pretrained):
        return spec
    return Pretrained(**spec) if isinstance(spec, Mapping) else Pretrained(spec)  # type: ignore[arg-type]


def check_available(spec: str | Mapping[str, Any] | Pretrained) -> None:
    """Raises early where ``spec`` cannot be loaded; reads no weights and converts nothing.

    From the hub only the small files (configuration, tokenizer) are fetched.

    Raises:
        FileNotFoundError: the model is nowhere; says where it was looked for and what to do.
        ModuleNotFoundError: a package that is needed to read it is missing.
        ValueError: a revision is asked of something that has none.
    """
    spec = as_pretrained(spec)
    folder = find_model(spec.name, spec.revision, weights=False)
    if gguf_file(folder) is not None:
        require_gguf_readers()
    if spec.adapter is not None:
        find_adapter(spec.adapter)


def locate(spec: str | Mapping[str, Any] | Pretrained) -> Path:
    """The folder that holds the model in Hugging Face's format, fetched or converted if need be.

    A GGUF file is dequantised to float32 once, into ``cache_folder()``.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: as ``check_available``.
    """
    return _locate(as_pretrained(spec), weights=True)


def load_config(spec: str | Mapping[str, Any] | Pretrained) -> PreTrainedConfig:
    """The configuration of ``spec``, with every kind of dropout set to 0.

    In the configuration, because T5's attention dropout is no ``nn.Dropout`` module that could
    be zeroed later, and policy and reference must be the same function in every pass.
    """
    spec = as_pretrained(spec)
    folder = _locate(spec, weights=False)
    config = loaded(
        spec.name,
        lambda: AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code),
    )
    _zero_dropout(config)
    return config


def load_model(
    spec: str | Mapping[str, Any] | Pretrained, auto_class: Any = None
) -> PreTrainedModel:
    """The model of ``spec``, without dropout, in eval mode as Transformers returns it.

    Args:
        spec: Which model.
        auto_class: A class with Transformers' ``from_pretrained``; by default
            ``AutoModelForSeq2SeqLM`` for encoder-decoders and ``AutoModelForCausalLM`` for the
            rest.

    Raises:
        ValueError: the files are damaged or do not fit each other; they lack some of the model's
            weights, which would be random; weights are not finite; or the adapter belongs to
            another base.
        FileNotFoundError, ModuleNotFoundError: as ``check_available``.
    """
    spec = as_pretrained(spec)
    if spec.adapter is not None:
        find_adapter(spec.adapter)  # an early error: the weights may be large
    config = load_config(spec)
    folder = locate(spec)
    check_weight_files(weight_files(folder))
    model, loading = loaded(
        spec.name,
        lambda: (auto_class or _auto_class(config)).from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, spec.dtype),
            attn_implementation=spec.attn_implementation,
            quantization_config=_quantization(spec),
            trust_remote_code=spec.trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # told below, with what they are
            output_loading_info=True,
        ),
    )
    if strange := sorted(loading["mismatched_keys"]):
        key, stored, own = strange[0]
        raise ValueError(
            f"The files of '{spec.name}' do not fit each other: {key} has shape {tuple(stored)} "
            f"in the weights and {tuple(own)} by config.json ({len(strange)} tensors differ). "
            "Put back the config.json that the weights were saved with."
        )
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"The files of '{spec.name}' hold no weights for {', '.join(missing[:5])}"
            f"{' …' if len(missing) > 5 else ''} of {type(model).__name__}, which would be "
            "random. Use a model that was saved with this head."
        )
    check_finite_weights(model, spec.name)
    return model if spec.adapter is None else merge_adapter(model, spec.adapter)


def load_skeleton(
    spec: str | Mapping[str, Any] | Pretrained, auto_class: Any = None
) -> PreTrainedModel:
    """The model of ``spec`` on the meta device: every shape and no weight.

    Args:
        spec: Which model; only its configuration is read.
        auto_class: As in ``load_model``.

    Raises:
        ValueError: it is quantised, which only loading does.
        FileNotFoundError, ModuleNotFoundError: as ``check_available``.
    """
    spec = as_pretrained(spec)
    if spec.quantization_config is not None:
        raise ValueError(
            f"'{spec.name}' is quantised on loading, so its size is not known before; leave "
            "quantization_config out to count it in its dtype."
        )
    config = load_config(spec)
    with torch.device("meta"):
        model: PreTrainedModel = (auto_class or _auto_class(config)).from_config(
            config,
            dtype=getattr(torch, spec.dtype),
            attn_implementation=spec.attn_implementation,
            trust_remote_code=spec.trust_remote_code,
        )
    return model


def _auto_class(config: PreTrainedConfig) -> Any:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def load_tokenizer(spec: str | Mapping[str, Any] | Pretrained) -> PreTrainedTokenizerBase:
    """The tokenizer of ``spec``, padding on the left.

    A missing pad token is filled by the end-of-sequence token, or else by the token with id 0:
    which positions count is always decided by a mask made from positions, never by comparing
    ids, so no id needs to be added.

    Raises:
        ValueError: there is no tokenizer beside the model.
        FileNotFoundError, ModuleNotFoundError: as ``check_available``.
    """
    spec = as_pretrained(spec)
    folder = _locate(spec, weights=False)
    outcome = attempt(
        lambda: AutoTokenizer.from_pretrained(
            folder, padding_side="left", trust_remote_code=spec.trust_remote_code
        )
    )
    error = outcome.exception()
    if error is not None and not isinstance(error, (ImportError, MemoryError)):
        raise ValueError(
            f"No tokenizer of '{spec.name}' could be loaded from {folder}: {error} "
            "Save one there with tokenizer.save_pretrained."
        ) from error
    tokenizer = outcome.result()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a response: those of the model's generation config and of the tokenizer.

    Nothing else of the generation config is used anywhere: its top_k or min_p would change the
    policy without a word.

    Returns:
        Sorted ids; empty where there is none (responses then have a fixed length).
    """
    config = model.generation_config
    own = None if config is None else config.eos_token_id
    ids = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return sorted(i for i in ids if i is not None)


def fingerprint(spec: str | Mapping[str, Any] | Pretrained) -> str:
    """Sha256 over name, shape, dtype and bytes of the tensors, as stored in the model's files.

    Independent of the folder's name, of sharding and of the dtype asked for; with an adapter, its
    tensors and settings count too.

    Returns:
        64 hexadecimal digits.

    Raises:
        FileNotFoundError, ModuleNotFoundError: as ``check_available``.
        ValueError: a file is no safetensors file, or a part of one.
    """
    spec = as_pretrained(spec)
    files = weight_files(locate(spec))
    check_weight_files(files)
    mark = weights_digest(files)
    if spec.adapter is None:
        return mark
    return hashlib.sha256((mark + adapter_digest(spec.adapter)).encode()).hexdigest()


def _zero_dropout(config: PreTrainedConfig) -> None:
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            _zero_dropout(value)
        elif "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(config, name, type(value)(0))


def _quantization(spec: Pretrained) -> Any:
    if spec.quantization_config is None:
        return None
    from transformers.quantizers import AutoQuantizationConfig

    return AutoQuantizationConfig.from_dict(spec.quantization_config)


def _locate(spec: Pretrained, *, weights: bool) -> Path:
    folder = find_model(spec.name, spec.revision, weights=weights)
    gguf = gguf_file(folder)
    return folder if gguf is None else convert_gguf(gguf)
