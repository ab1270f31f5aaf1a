"""The folder of a saved policy: safetensors and json, nothing pickled.

``clp.json`` says what the policy is; every LoRA lies in a sub-folder of its own, which plain PEFT
loads alone; whatever else is trained lies in ``weights.safetensors``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..conditioning.adapter import PEFT_PREFIX, save_adapter
from ..described import describe
from ..policy import Policy
from ..pretrained import Pretrained
from ..rewards.bank import check_reward_name
from .trained import Trained, lora_of

__all__ = ["DESCRIPTION", "read_folder", "write_folder"]

DESCRIPTION = "clp.json"
_SCHEMA = 1
_WEIGHTS = "weights.safetensors"


def write_folder(folder: Path, policy: Policy, trained: Trained, version: str) -> None:
    """Writes the description and the weights.

    Args:
        folder: An empty or missing one, or one that this function wrote.
        policy: The policy itself, with the weights.
        trained: What it is.
        version: Of this library.

    Raises:
        ValueError: two adapters would share a folder.
    """
    rule, lora = policy.conditioner.coefficients, lora_of(policy.conditioner)
    adapters = {} if lora is None else lora.adapters()
    folded = [name.casefold() for name in adapters]
    if len(set(folded)) < len(folded):
        raise ValueError(
            f"{list(adapters)} would share a folder where upper and lower case are the same; "
            "rename one."
        )
    _prepare(folder)
    rest = {name: parameter.detach() for name, parameter in policy.trained_parameters().items()}
    own = _own_adapters(trained.conditioner, trained.rewards)
    for name, layers in adapters.items():
        check_reward_name(name)
        save_adapter(
            folder / name,
            layers,
            base_name=trained.pretrained.name,
            revision=trained.pretrained.revision,
            is_encoder_decoder=policy.model.config.is_encoder_decoder,
        )
        for key in _adapter_keys(name, layers, own).values():
            rest.pop(key)
    tensors = {key: value.detach().cpu().contiguous() for key, value in rest.items()}
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    base = asdict(trained.pretrained) | {"fingerprint": trained.fingerprint}
    del base["trust_remote_code"]  # for the reader of the folder to allow, not for its writer
    description: dict[str, Any] = {
        "schema": _SCHEMA,
        "library_version": version,
        "base": base,
        "adapters": list(adapters),
        "coefficients": describe(rule) | {"shared": rule.shared},
    }
    for field in _FIELDS:
        description[field] = getattr(trained, field)
    description["conditioner"] = _starting_from(
        trained.conditioner, {name: name for name in adapters}
    )
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1, allow_nan=False))


_FIELDS = [
    "conditioner",
    "encoding",
    "temperature",
    "max_new_tokens",
    "rewards",
    "statistics",
    "alpha_range",
    "front",
]


def read_folder(folder: Path, trust_remote_code: bool) -> Trained:
    """What ``write_folder`` wrote.

    Raises:
        ValueError: a newer schema, a name that is none, or files that are damaged.
    """
    with _naming(folder):
        return _read(folder, trust_remote_code)


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Turns what damaged files raise into one error that names the folder."""
    try:
        yield
    except (json.JSONDecodeError, SafetensorError, KeyError, TypeError, FileNotFoundError) as error:
        raise ValueError(
            f"The saved policy in {folder} is damaged or not whole ({type(error).__name__}: "
            f"{error}). Save or fetch it again."
        ) from error


def _read(folder: Path, trust_remote_code: bool) -> Trained:
    description = json.loads((folder / DESCRIPTION).read_text())
    if description.get("schema") != _SCHEMA:
        raise ValueError(
            f"{folder / DESCRIPTION} has schema {description.get('schema')}; this version of "
            f"clp_lightning reads {_SCHEMA}. Install the version that wrote it: "
            f"{description.get('library_version')}."
        )
    adapters: list[str] = description["adapters"]
    for name in [*description["rewards"], *adapters]:
        check_reward_name(name)  # before it is part of a path
    base = dict(description["base"])
    mark = base.pop("fingerprint")
    state = dict(load_file(folder / _WEIGHTS))
    own = _own_adapters(description["conditioner"], description["rewards"])
    for name in adapters:
        tensors = load_file(folder / name / "adapter_model.safetensors")
        layers = dict.fromkeys(key.removeprefix(PEFT_PREFIX).rsplit(".lora_")[0] for key in tensors)
        keys = _adapter_keys(name, layers, own)
        state |= {keys[stored]: value for stored, value in tensors.items()}
    places = {name: str(folder / name) for name in adapters}
    settings = {field: description[field] for field in _FIELDS}
    settings["conditioner"] = _starting_from(settings["conditioner"], places)
    return Trained(
        pretrained=Pretrained(**base, trust_remote_code=trust_remote_code),
        fingerprint=mark,
        state=state,
        **settings,
    )


def _prepare(folder: Path) -> None:
    """Makes ``folder``; of a policy saved there before, removes the adapters."""
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        return
    if not (folder / DESCRIPTION).is_file():
        raise ValueError(f"{folder} is not empty and holds no saved policy; give another folder.")
    with _naming(folder):
        old: list[str] = json.loads((folder / DESCRIPTION).read_text())["adapters"]
    for name in old:
        check_reward_name(name)
        shutil.rmtree(folder / name, ignore_errors=True)


def _own_adapters(conditioner: Mapping[str, Any], rewards: Sequence[str]) -> Sequence[str]:
    """The rewards that have an adapter; a LoRA inside another conditioner has only the shared."""
    return [] if isinstance(conditioner["init_args"].get("rest"), Mapping) else rewards


def _adapter_keys(name: str, layers: Iterable[str], rewards: Sequence[str]) -> dict[str, str]:
    """Names of an adapter's tensors in its file to their names in the policy."""
    adapter = f"reward_{name}" if name in rewards else name
    return {
        f"{PEFT_PREFIX}{layer}.{part}.weight": f"model.{layer}.{part}.{adapter}.weight"
        for layer in layers
        for part in ("lora_A", "lora_B")
    }


def _starting_from(conditioner: dict[str, Any], places: dict[str, str]) -> dict[str, Any]:
    """The description of a LoRA, or of one inside, with other adapters to start from.

    An adapter that training started from decides its own shape, so it is looked up where the
    trained one was saved.
    """
    arguments = dict(conditioner["init_args"])
    if arguments.get("start_from"):
        arguments["start_from"] = places
    if isinstance(arguments.get("rest"), Mapping):
        arguments["rest"] = _starting_from(arguments["rest"], places)
    return {**conditioner, "init_args": arguments}
