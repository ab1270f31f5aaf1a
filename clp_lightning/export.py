"""One preference of a trained dial, folded into what others can load without this library."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from huggingface_hub import ModelCardData
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import CHAT_TEMPLATE_DIR

from .conditioning import LoRA, PromptText
from .conditioning.adapter import read_adapter, save_adapter, stack
from .functional import parse_weights
from .policy import Policy
from .pretrained import locate
from .sources import find_model, gguf_file
from .steerable import SteerablePolicy, base_licence, hub_name
from .tuned import untie
from .types import Preference

__all__ = ["export", "export_adapter", "export_model"]

_KEPT = ["*.json", "*.jinja", "*.txt", "*.model", "*.py", "LICENSE*"]
_NOT_KEPT = ["config.json", "*.index.json", "adapter*.json", "clp.json"]

_DO_NOT_MERGE = (
    "The adapter is on the output layer, which in this base is the embedding table too. Load it "
    "beside the base, and do not merge it: PEFT's merge would move the embeddings with it. For "
    "plain weights export with --format hf."
)

# What `PromptText.rewrite` does, as Jinja: the text goes in front of the last user message.
_TEMPLATE = """\
{%- set clp = namespace(row=0, messages=[]) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set clp.row = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if loop.index0 == clp.row -%}
{%- set clp.messages = clp.messages + [dict(message, content=__TEXT__ + message.content)] -%}
{%- else -%}
{%- set clp.messages = clp.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = clp.messages -%}
"""


def export(
    ckpt: str,
    out: str,
    weights: str | None = None,
    alpha: float | None = None,
    format: Literal["hf", "peft"] = "hf",
    presets: str | None = None,
    base: str | None = None,
) -> None:
    """Writes a trained policy at one preference as a plain model, or as one plain PEFT adapter.

    Args:
        ckpt: A run's folder, a .ckpt file, a saved policy's folder or its name on the hub.
        out: The folder to write; new or empty.
        weights: The weight of every reward, as in support=.7,brevity=.3.
        alpha: KL strength in [0, 1]; 1 is the reference.
        format: ``hf`` is a folder that Transformers loads without this library; ``peft`` is one
            adapter beside the unchanged base, for a policy trained with LoRA.
        presets: Instead of weights and alpha, a YAML file of several preferences by name, each
            with ``weights`` (reward to number) and ``alpha``; each is written into OUT/NAME.
        base: Where the base lies, if not where the policy says.
    """
    asked = _asked(weights, alpha, presets)
    places = [Path(out) / name if name else Path(out) for name in asked]
    for folder in places:
        _check_new(folder)
    steerable = SteerablePolicy.from_pretrained(ckpt, base=base, device="cpu")
    preferences = [steerable.preference(*given) for given in asked.values()]
    write = export_model if format == "hf" else export_adapter
    notes: list[str] = []
    for folder, preference in zip(places, preferences, strict=True):
        notes += write(steerable, preference, folder)
        print(f"exported: {folder}")
    for note in dict.fromkeys(notes):  # each once
        print(note)
    spec = steerable.policy.pretrained
    if format == "hf" and gguf_file(find_model(spec.name, spec.revision, weights=False)):
        print("The base came as GGUF; the exported weights are its dequantised ones, changed.")


@torch.no_grad()
def export_model(steerable: SteerablePolicy, preference: Preference, folder: Path) -> list[str]:
    """Writes plain weights that answer as the policy does at one preference.

    The folder has what the base's had: tokenizer, its own generation_config and configuration. The
    weights have the type that the policy computes in. An output layer that no longer is the
    embedding table is written on its own, with ``tie_word_embeddings: false``. Of ``PromptText``
    the preference goes into the chat template, if there is one.

    Args:
        steerable: The policy.
        preference: One row.
        folder: New or empty.

    Returns:
        What the files cannot say about how to ask; it stands on the card too.

    Raises:
        ValueError: the base is quantised, or the policy rewrites prompts by code of its own.
    """
    _check_new(folder)
    policy = steerable.policy
    text = _prompt_text(policy, preference)
    source = locate(policy.pretrained)
    state = policy.conditioner.fold(preference)
    changes = {"architectures": [type(policy.model).__name__]} | untie(policy.model, state)
    with torch.device("meta"):
        plain = type(policy.model)(policy.model.config)
    plain.load_state_dict(state, assign=True)
    plain.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    config = json.loads((source / "config.json").read_text())
    for old in ("torch_dtype", "quantization_config"):
        config.pop(old, None)
    config |= {"dtype": written["dtype"]} | changes
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").unlink(missing_ok=True)  # the base's own, if it has one
    for file in source.iterdir():
        if _matches(file.name, _KEPT) and not _matches(file.name, _NOT_KEPT):
            shutil.copy(file, folder / file.name)
    if (source / CHAT_TEMPLATE_DIR).is_dir():  # templates beside the default one
        shutil.copytree(source / CHAT_TEMPLATE_DIR, folder / CHAT_TEMPLATE_DIR)
    notes = _how_to_ask(policy)
    if text is not None:
        in_template = isinstance(policy.tokenizer.chat_template, str)
        if in_template:
            _write_into_template(folder, text)
        notes.insert(0, _text_to_write(text, in_template))
    _write_card(steerable, preference, folder, "transformers", notes)
    return notes


def export_adapter(steerable: SteerablePolicy, preference: Preference, folder: Path) -> list[str]:
    """Writes one LoRA that does, beside the base, what the policy does at one preference.

    All adapters stacked in the rank dimension, coefficients inside, the one that the base was
    tuned with before too: exact, of rank sum r.

    Args:
        steerable: A policy trained with LoRA.
        preference: One row.
        folder: New or empty.

    Returns:
        What the files cannot say about how to use it; it stands on the card too.

    Raises:
        ValueError: the policy is no LoRA, or its base was tuned with something else.
    """
    _check_new(folder)
    policy = steerable.policy
    if not isinstance(policy.conditioner, LoRA):
        raise ValueError(
            f"A {type(policy.conditioner).__name__} policy is no adapter; use --format hf."
        )
    layers = policy.conditioner.concatenated(preference)
    if policy.pretrained.adapter is not None:  # the files name the base as it was before
        layers = stack(read_adapter(policy.pretrained.adapter), layers)
    save_adapter(
        folder,
        layers,
        base_name=policy.pretrained.name,
        revision=policy.pretrained.revision,
        is_encoder_decoder=policy.model.config.is_encoder_decoder,
    )
    notes = _how_to_ask(policy)
    if _on_tied_output(policy.model, layers):
        notes.append(_DO_NOT_MERGE)
    _write_card(steerable, preference, folder, "peft", notes)
    return notes


def _asked(
    weights: str | None, alpha: float | None, presets: str | None
) -> dict[str, tuple[Mapping[str, float], float]]:
    """Weights and alpha by the name of the preset, or of the one preference without a name."""
    if presets is None:
        if weights is None or alpha is None:
            raise ValueError("Give --weights and --alpha, or --presets FILE.")
        return {"": (parse_weights(weights), alpha)}
    if weights is not None or alpha is not None:
        raise ValueError("Give --presets, or --weights and --alpha, not both.")
    example = "short: {weights: {support: 0.2, brevity: 0.8}, alpha: 0.05}"
    try:
        content: Any = yaml.safe_load(Path(presets).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{presets} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{presets} holds no presets; write lines such as {example}")
    for name, preset in content.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
            raise ValueError(
                f"{name!r} cannot be the name of a preset, which becomes a folder: use letters, "
                "digits, _ and -, in quotes where YAML reads something else."
            )
        fits = isinstance(preset, dict) and preset.keys() == {"weights", "alpha"}
        if not fits or not isinstance(preset["weights"], dict):
            raise ValueError(f"Preset '{name}' of {presets} must be written like {example}")
    if len({name.casefold() for name in content}) < len(content):
        raise ValueError(
            f"{[*content]} would share a folder where upper and lower case are the same; rename "
            "one."
        )
    return {name: (preset["weights"], preset["alpha"]) for name, preset in content.items()}


def _check_new(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty; give a new folder, so that nothing old stays.")


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _prompt_text(policy: Policy, preference: Preference) -> str | None:
    """The text that the policy reads in front of a prompt; None where it reads none."""
    conditioner = policy.conditioner
    if not conditioner.rewrites:
        return None
    if type(conditioner).rewrite is not PromptText.rewrite:
        raise ValueError(
            f"{type(conditioner).__name__} rewrites prompts, which no weights can do; save the "
            "policy with SteerablePolicy.save_pretrained instead."
        )
    assert isinstance(conditioner, PromptText)
    return conditioner.text(preference.weights[0].tolist(), float(preference.alpha[0]))


def _on_tied_output(model: PreTrainedModel, layers: Collection[str]) -> bool:
    """Whether a LoRA is on an output layer that in the base is the embedding table."""
    output = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is output]
    return any(n in layers and f"{n}.weight" in model.all_tied_weights_keys for n in names)


def _write_into_template(folder: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = _TEMPLATE.replace("__TEXT__", json.dumps(text)) + str(
        tokenizer.chat_template
    )
    tokenizer.save_pretrained(folder)


def _text_to_write(text: str, in_template: bool) -> str:
    which = "every prompt"
    if in_template:
        which = "a prompt that is not a conversation (the chat template writes it into those)"
    return f"The preference is text: put {json.dumps(text)} in front of {which}."


def _how_to_ask(policy: Policy) -> list[str]:
    """How the policy was asked in training, where that is not as usual."""
    notes = []
    if policy.encoding.chat_template_kwargs:
        given = json.dumps(policy.encoding.chat_template_kwargs)
        notes.append(f"Its chat template was given {given}.")
    if policy.temperature != 1:
        notes.append(f"It was trained at temperature {policy.temperature:g}.")
    return notes


def _write_card(
    steerable: SteerablePolicy,
    preference: Preference,
    folder: Path,
    library: str,
    notes: list[str],
) -> None:
    base = steerable.policy.pretrained.name
    weights = dict(zip(steerable.names, preference.weights[0].tolist(), strict=True))
    shown = ", ".join(f"{name} {weight:.3g}" for name, weight in weights.items())
    data = ModelCardData(
        library_name=library,
        base_model=hub_name(steerable.policy.pretrained),
        license=base_licence(steerable.policy.pretrained),
        tags=["clp_lightning"],
    )
    (folder / "README.md").write_text(
        f"---\n{data.to_yaml()}\n---\n\nOne preference of a steerable policy on `{base}`, exported "
        f"with clp_lightning: {shown}; alpha {float(preference.alpha[0]):.3g}.\n"
        + "".join(f"\n{note}\n" for note in notes)
    )
