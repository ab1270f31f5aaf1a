"""Which responses of two runs belong together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clp_lightning.judge import read_pairs


def record(prompt_id: int = 0, kind: float = 0.25, **fields: Any) -> dict[str, Any]:
    return {
        "prompt_id": prompt_id,
        "sample": 0,
        "prompt": f"prompt {prompt_id}",
        "completion": "yes",
        "weights": {"kind": kind, "short": 1 - kind},
        "alpha": 0.1,
        "truncated": False,
        "rewards": {"kind": 1.0},
        **fields,
    }


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def test_responses_to_the_same_question_are_paired(tmp_path: Path) -> None:
    base = record(3, completion="first")
    first = write(
        tmp_path / "first/predictions.jsonl",
        record(5, completion="later"),
        base,
        base | {"sample": 1, "completion": "its second sample"},
        base | {"alpha": 0.2, "completion": "at another alpha"},
        record(3, kind=0.5, completion="at other weights"),
        record(4, completion="nobody else has this"),
    )
    second = write(
        tmp_path / "second.jsonl",
        # Written by another program: the names in another order, a number through float32.
        base | {"weights": {"short": 0.75, "kind": 0.2500000037}, "completion": "the same"},
        base | {"sample": 2},
        base | {"alpha": 0.3},
        record(3, kind=0.6),
        record(5, completion="also later"),
    )
    pairs, unmatched = read_pairs(first.parent, second)
    assert [(p.prompt_id, p.prompt, p.first, p.second) for p in pairs] == [
        (3, "prompt 3", "first", "the same"),
        (5, "prompt 5", "later", "also later"),
    ]
    assert pairs[0].preference == ((("kind", 0.25), ("short", 0.75)), 0.1)
    assert unmatched == {"first": 4, "second": 3}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "second.jsonl is empty"),
        ([record(1)], "no response in common.*prompt 0, sample 0, kind=0.25,short=0.75, alpha 0.1"),
        ([record() | {"weights": {"kind": 0.25}}], "no response in common.*kind=0.25, alpha 0.1"),
        ([record(prompt="another")], "Prompt 0 differs between .*other data or another template"),
        ([record(), record()], "Line 2 of .* prompt 0, sample 0 is there twice"),
        ([{"prompt": "p"}], "Line 1 of .*second.jsonl is not a prediction"),
        ([record(completion=None)], "Line 1 of .* is not a prediction"),
        ([record(weights=[0.5])], "Line 1 of .* is not a prediction"),
        ([record(), [1]], "Line 2 of .* is not a prediction"),
    ],
)
def test_what_cannot_be_compared_is_refused(lines: Any, message: str, tmp_path: Path) -> None:
    first = write(tmp_path / "first.jsonl", record())
    with pytest.raises(ValueError, match=message):
        read_pairs(first, write(tmp_path / "second.jsonl", *lines))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    first = write(tmp_path / "first.jsonl", record())
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"There is no .*\.jsonl.*predict --config"):
            read_pairs(first, path)
    first.write_text("no JSON\n")
    with pytest.raises(ValueError, match="Line 1 of .* is not a prediction"):
        read_pairs(first, first)
