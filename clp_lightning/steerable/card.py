"""The model card of a saved policy."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, hf_hub_download

from ..pretrained import Pretrained, locate
from ..tables import markdown_table, point_cells, point_label
from .trained import Trained

__all__ = ["PICTURE", "base_licence", "hub_name", "model_card"]

_BODY = """
# A steerable policy: {rewards}

One language model for every weighting of {rewards} and every KL strength `alpha`, trained with
`clp_lightning` {version} (Conditioned Language Policy, arXiv 2407.15762) on the base `{base}`
(fingerprint `{fingerprint}`).

## How to load

```python
from clp_lightning import SteerablePolicy

policy = SteerablePolicy.from_pretrained("{place}")
rollout = policy.generate(["..."], weights={weights}, alpha={alpha})
print(rollout.completions[0])
```
{elsewhere}{tuned}{adapters}
## The dial

{trained}
{front}
Licence of the base: {licence}.
"""


def model_card(trained: Trained, adapters: list[str], version: str, place: str) -> str:
    """The text of README.md.

    Args:
        trained: What the policy is.
        adapters: Sub-folders that hold a LoRA.
        version: Of this library.
        place: Where the card says to load it from.
    """
    base, names = trained.pretrained, trained.rewards
    licence = base_licence(base)
    local = Path(base.name).expanduser().is_dir()
    data = ModelCardData(
        library_name="clp_lightning",
        base_model=hub_name(base),
        license=licence,
        tags=["clp_lightning", "conditioned-language-policy", "multi-objective", "steerable"],
    )
    low, high = trained.alpha_range or (None, None)
    text = _BODY.format(
        rewards=", ".join(names),
        version=version,
        base=base.name,
        fingerprint=trained.fingerprint[:12],
        place=place,
        weights=json.dumps(_about_equal(names)),
        alpha=trained.front["points"][0]["alpha"] if trained.front else low or 0.1,
        elsewhere="" if not local else _ELSEWHERE.format(base=base.name),
        tuned="" if base.adapter is None else _TUNED.format(adapter=base.adapter),
        adapters=""
        if not adapters
        else _ADAPTERS.format(adapters=_quoted(adapters), place=place, first=adapters[0]),
        trained="The alphas of training are not recorded."
        if low is None
        else f"Trained with alpha from {low:g} to {high:g}.",
        front="" if trained.front is None else _front(trained.front),
        licence=licence or "not stated by its files; look at where it comes from",
    )
    return f"---\n{data.to_yaml()}\n---\n{text}"


_ELSEWHERE = """
The base is a folder (`{base}`). Where it lies elsewhere, add `base="FOLDER"`; its fingerprint is
checked.
"""
_ADAPTERS = """
Each of {adapters} is also a plain PEFT adapter, of that reward alone (`shared` belongs to all):
`PeftModel.from_pretrained(base, "{place}", subfolder="{first}")`.
"""
_TUNED = """
The base is used with the adapter `{adapter}` merged into it, which is the reference.
"""


def _about_equal(names: list[str]) -> dict[str, float]:
    """Weights to start from, in tenths, which sum to 1 as they are written."""
    each = 10 // len(names)
    first = 10 - each * (len(names) - 1)
    return {name: (each if i else first) / 10 for i, name in enumerate(names)}


def _quoted(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _front(front: dict[str, Any]) -> str:
    """The table of a front, the picture above it where there is one."""
    names = front["rewards"]
    head = ["", "alpha", *names, "KL", "length", "V"]
    rows = [["reference", "", *point_cells(front["reference"], names, None)]]
    for point in front["points"]:
        label, alpha = point_label(point, names), f"{point['alpha']:g}"
        rows.append([label, alpha, *point_cells(point, names, point["value"])])
    decoding = front.get("decoding", {})
    note = ", ".join(f"{name} {value}" for name, value in decoding.items())
    return (
        f"\n![Front]({PICTURE})\n\nMeans of the raw rewards at each weighting "
        f"({' / '.join(names)}), {front['reference']['n']} prompts; decoding: {note}.\n\n"
        + markdown_table(head, rows)
        + "\n"
    )


PICTURE = "front.png"


def hub_name(base: Pretrained) -> str | None:
    """The base's name on the hub; None for a folder and for an installed package."""
    return None if Path(base.name).expanduser().is_dir() or "/" not in base.name else base.name


def base_licence(base: Pretrained) -> str | None:
    """The licence that the base's own card names; None where there is no card, or none named."""
    card = locate(base) / "README.md"
    if not card.is_file():
        name = hub_name(base)
        if name is None:
            return None
        try:
            card = Path(hf_hub_download(name, "README.md", revision=base.revision))
        except (OSError, ValueError):  # not there, or no network
            return None
    header = card.read_text(errors="replace").split("\n---", 1)[0]
    found = re.search(r"^license:\s*['\"]?([\w.+-]+)", header, re.MULTILINE)
    return found[1] if found else None
