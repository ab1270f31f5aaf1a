"""Responses of two runs to the same prompt under the same preference."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..types import Prompt

__all__ = ["Pair", "Preferred", "read_pairs"]

Preferred = tuple[tuple[tuple[str, float], ...], float]
"""A preference that can be compared: weights by name, and alpha, both rounded."""
_Key = tuple[int, int, Preferred]
_DIGITS = 6  # weights went through float32


@dataclass
class Pair:
    """Two responses to one prompt.

    Attributes:
        prompt_id: The prompt's row in the data.
        sample: Number of the response among those to the prompt.
        preference: What was asked of both.
        prompt: The prompt of both.
        first: Response of the first run.
        second: Response of the second.
    """

    prompt_id: int
    sample: int
    preference: Preferred
    prompt: Prompt
    first: str
    second: str


def read_pairs(first: str | Path, second: str | Path) -> tuple[list[Pair], dict[str, int]]:
    """Matches the responses of two runs by prompt, sample, weights and alpha.

    Args:
        first: A predictions.jsonl as ``predict`` writes it, or the run's folder.
        second: Another one, of the same data and preferences.

    Returns:
        The pairs, in the order of the prompts, and how many responses of each run have no partner.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no prediction, a response is there twice, nothing matches, or the
            prompts differ.
    """
    one, other = _read(first), _read(second)
    both = sorted(one.keys() & other.keys())
    if not both:
        raise ValueError(
            f"{first} and {second} have no response in common. {_example(first, one)} "
            f"{_example(second, other)} Run predict on the same data with the same grid and "
            "eval_samples."
        )
    for key in both:
        if one[key]["prompt"] != other[key]["prompt"]:
            raise ValueError(
                f"Prompt {key[0]} differs between {first} and {second}: they are of other data "
                "or another template."
            )
    pairs = [Pair(*k, one[k]["prompt"], one[k]["completion"], other[k]["completion"]) for k in both]
    return pairs, {"first": len(one) - len(both), "second": len(other) - len(both)}


def _read(path: str | Path) -> dict[_Key, dict[str, Any]]:
    file = Path(path)
    if file.is_dir():
        file = file / "predictions.jsonl"
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no {file}. python -m clp_lightning predict --config … --ckpt_path RUN "
            "writes predictions.jsonl into the run's folder."
        )
    records: dict[_Key, dict[str, Any]] = {}
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                key = _key(record)
                complete = isinstance(record["completion"], str) and "prompt" in record
            except (ValueError, KeyError, TypeError, AttributeError):
                complete = False
            if not complete:
                raise ValueError(f"Line {number} of {file} is not a prediction as predict writes.")
            if key in records:
                raise ValueError(
                    f"Line {number} of {file}: prompt {key[0]}, sample {key[1]} is there twice "
                    "under one preference."
                )
            records[key] = record
    if not records:
        raise ValueError(f"{file} is empty.")
    return records


def _key(record: dict[str, Any]) -> _Key:
    weights = {name: round(weight, _DIGITS) for name, weight in record["weights"].items()}
    preference = (tuple(sorted(weights.items())), round(record["alpha"], _DIGITS))
    return int(record["prompt_id"]), int(record["sample"]), preference


def _example(path: str | Path, records: dict[_Key, dict[str, Any]]) -> str:
    prompt_id, sample, (weights, alpha) = next(iter(records))
    written = ",".join(f"{name}={weight:g}" for name, weight in weights)
    return f"{path} has, for one, prompt {prompt_id}, sample {sample}, {written}, alpha {alpha:g}."
