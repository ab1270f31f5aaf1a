"""Which layers of a Transformers model are meant: presets and patterns."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

__all__ = ["PRESETS", "check_preset", "in_attention", "linear_names", "select_layers"]

PRESETS = ("attention", "all-linear", "all-linear+output")
_BLOCK = re.compile(r"\.(\d+)\.")


def check_preset(targets: str | Sequence[str], presets: Sequence[str]) -> None:
    """Refuses a string that is none of ``presets``.

    Raises:
        ValueError: naming them.
    """
    if isinstance(targets, str) and targets not in presets:
        raise ValueError(
            f"Unknown preset '{targets}': use one of {', '.join(presets)}, or a list of patterns."
        )


def linear_names(model: nn.Module) -> list[str]:
    """Full names of every linear layer (Linear, its quantised kin, Conv1D) of ``model``."""
    return [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]


def in_attention(name: str) -> bool:
    """Whether a layer stands inside an attention block."""
    # By ancestor, not by the layer's own name: GPT-2 calls both its attention's and its MLP's
    # output c_proj, and fused projections have a name of their own in every family.
    return any(
        "attn" in part.lower() or "attention" in part.lower() for part in name.split(".")[:-1]
    )


def select_layers(
    model: nn.Module, targets: str | Sequence[str], last_blocks: int | None = None
) -> list[str]:
    """Full names of the linear layers that ``targets`` means.

    Args:
        model: A Transformers model.
        targets: ``attention`` (every projection inside an attention block, fused ones too),
            ``all-linear`` (all linear layers but the output layer), ``all-linear+output``, or a
            list of regular expressions, each searched for in the full name.
        last_blocks: Keep only the last so many transformer blocks (layers outside any block, as
            the output layer, stay).

    Raises:
        ValueError: where a preset is unknown or a pattern matches nothing; lists the names.
    """
    names = linear_names(model)
    output = model.get_output_embeddings()  # type: ignore[operator]
    is_output = {name: module is output for name, module in model.named_modules()}
    check_preset(targets, PRESETS)
    if targets == "attention":
        chosen = [name for name in names if in_attention(name)]
    elif targets == "all-linear":
        chosen = [name for name in names if not is_output[name]]
    elif targets == "all-linear+output":
        chosen = names
    else:
        for pattern in targets:
            if not any(re.search(pattern, name) for name in names):
                raise ValueError(_no_match(pattern, names))
        chosen = [name for name in names if any(re.search(p, name) for p in targets)]
    if last_blocks is not None:
        chosen = _keep_last(chosen, names, last_blocks)
    if not chosen:
        raise ValueError(_no_match(str(targets), names))
    return chosen


def _keep_last(chosen: list[str], names: list[str], last_blocks: int) -> list[str]:
    """Drops layers of earlier blocks; encoder and decoder stacks count on their own."""

    def place(name: str) -> tuple[str, int] | None:
        found = _BLOCK.search(name)
        return (name[: found.start()], int(found[1])) if found else None

    depth: dict[str, int] = {}
    for stack, block in filter(None, map(place, names)):
        depth[stack] = max(depth.get(stack, 0), block + 1)
    if last_blocks < 1:
        raise ValueError(f"last_blocks must be at least 1; got {last_blocks}.")
    return [
        name
        for name in chosen
        if (where := place(name)) is None or where[1] >= depth[where[0]] - last_blocks
    ]


def _no_match(pattern: str, names: list[str]) -> str:
    kinds = sorted({re.sub(r"\.\d+\.", ".N.", name) for name in names})
    return f"'{pattern}' matches no linear layer. This model has: {', '.join(kinds)}."
