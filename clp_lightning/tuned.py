"""An adapter that a base was tuned with before: found, merged into the weights, told apart."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .intact import check_finite_weights, check_weight_files, loaded
from .sources import weights_digest

__all__ = ["adapter_digest", "find_adapter", "merge_adapter", "untie"]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# They say where an adapter comes from, not what it computes.
_PROVENANCE = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
    "task_type",
}


def find_adapter(name: str) -> Path:
    """The folder of a PEFT adapter, fetched if need be.

    Args:
        name: A folder, or a name on the hub; looked for in this order.

    Raises:
        FileNotFoundError: it is nowhere; says where it was looked for and what to do.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        missing = [file for file in (_CONFIG, _WEIGHTS) if not (folder / file).is_file()]
        if not missing:
            return folder
        raise FileNotFoundError(
            f"The folder {folder.absolute()} holds no adapter: it lacks {' and '.join(missing)}. "
            "Save one there with PEFT's save_pretrained (pickled weights are not read)."
        )
    from huggingface_hub import snapshot_download

    try:
        fetched = Path(snapshot_download(name, allow_patterns=[_CONFIG, _WEIGHTS]))
        if not all((fetched / file).is_file() for file in (_CONFIG, _WEIGHTS)):
            raise FileNotFoundError(f"no {_CONFIG} with {_WEIGHTS} in {fetched}")
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"The adapter '{name}' was not found. Looked for: folder {folder.absolute()} (not "
            f"there); Hugging Face hub ({' '.join(str(error).split())}). Check the path, or merge "
            "the adapter into its base with PEFT's merge_and_unload and give that folder."
        ) from error
    return fetched


def merge_adapter(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """``model`` with the adapter added to its weights, as if it had never had one.

    In place. Where the adapter is on one of several tied tensors, that one comes apart from the
    others first: they must not move with it.

    Args:
        model: The base that the adapter was trained on.
        name: As ``find_adapter`` takes it.

    Raises:
        FileNotFoundError: as ``find_adapter``.
        ValueError: the adapter is damaged, is no change of weights, or belongs to another base.
    """
    from peft import PeftConfig, get_peft_model

    folder = str(find_adapter(name))
    check_weight_files([Path(folder, _WEIGHTS)])
    config = loaded(name, lambda: PeftConfig.from_pretrained(folder))
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ValueError(
            f"The adapter '{name}' is of type {config.peft_type}, which is no change of weights "
            "and cannot be merged. Give a LoRA."
        )
    config.task_type = None  # of a head, which the model here may not have
    # PEFT draws initial weights that are overwritten, and warns of ties that are undone here.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
        try:
            tuned: Any = get_peft_model(model, config)
            found = tuned.load_adapter(folder, "default", torch_device="cpu")
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"The adapter '{name}' does not fit its base: {error}") from error
        if strange := [*found.unexpected_keys, *found.missing_keys]:
            raise ValueError(
                f"The adapter '{name}' does not fit its base: its file and the model differ in "
                f"{len(strange)} tensors, first {strange[0]}. Was it trained on another base?"
            )
        _take_apart(tuned)
        merged: PreTrainedModel = tuned.merge_and_unload()
    check_finite_weights(merged, name)
    return merged.requires_grad_(True).eval()


def _take_apart(model: nn.Module) -> None:
    """Gives every adapted layer tensors of its own."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            base = layer.get_base_layer()
            for name, parameter in base.named_parameters(recurse=False):
                if owners[id(parameter)] > 1:
                    setattr(base, name, nn.Parameter(parameter.detach().clone()))


def untie(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Any]:
    """What to change in the configuration where tensors that ``model`` ties came apart.

    Those that did not are made one tensor again.

    Args:
        model: Says which tensors are tied.
        state: Its plain state dict, changed in place.
    """
    apart = False
    for target, source in dict(model.all_tied_weights_keys).items():
        if torch.equal(state[target], state[source]):
            state[target] = state[source]
        else:
            apart = True
    if not apart:
        return {}
    changes: dict[str, Any] = {"tie_word_embeddings": False}
    # T5 scales what its output layer reads only where that is the embedding table.
    if getattr(model.config, "scale_decoder_outputs", False):
        output = model.get_output_embeddings()
        (head,) = [f"{name}.weight" for name, m in model.named_modules() if m is output]
        state[head] = state[head] * model.config.d_model**-0.5
        changes["scale_decoder_outputs"] = False
    return changes


def adapter_digest(name: str) -> str:
    """Sha256 over an adapter's tensors and what its configuration says about what it computes.

    Raises:
        FileNotFoundError: as ``find_adapter``.
    """
    folder = find_adapter(name)
    settings: dict[str, Any] = json.loads((folder / _CONFIG).read_text())
    kept = {
        # PEFT writes sets of layers in any order.
        key: sorted(value) if _is_texts(value) else value
        for key, value in settings.items()
        if key not in _PROVENANCE and value is not None
    }
    text = weights_digest([folder / _WEIGHTS]) + json.dumps(kept, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
