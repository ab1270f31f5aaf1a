"""What may be wrong with a config or a data file: seeded damage, and what a good answer is."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SECONDS = 20
MOST_LINES = 8
KINDS = (
    "delete",
    "rename",
    "retype",
    "nan",
    "inf",
    "negative",
    "huge",
    "class_path",
    "missing file",
    "duplicate key",
)
# Too common to tell where a mistake is.
COMMON = ("class_path", "init_args", "model", "data", "trainer")
# A refusal says what to do, what would be right, or which values there are.
SUGGESTS = re.compile(
    r"did you mean|\b(must|should|has to|have to|needs?|takes|expected|give|use|set|add|save|leave"
    r"|lower|remove|choose|write|mend|put|make|install|check)\b|at least|are required|accepts from"
    r"|is a (number|share|whole number)|the rewards are",
    re.IGNORECASE,
)
Path_ = tuple[Any, ...]


@dataclass
class Trial:
    """A damaged config, and how it fared.

    Attributes:
        name: What was done, for the report.
        text: The YAML file.
        marks: Any of these must stand in a refusal.
        kind: Of the damage.
        code: Exit status; None where time was up.
        output: What the command printed.
        seconds: How long it took.
    """

    name: str
    text: str
    marks: list[str]
    kind: str = ""
    code: int | None = None
    output: str = ""
    seconds: float = 0.0

    def answered_as(self, other: Trial) -> None:
        """Takes over how ``other`` fared, which is damaged alike."""
        self.code, self.output, self.seconds = other.code, other.output, other.seconds

    @property
    def fault(self) -> str | None:
        """What is wrong with the answer; None where it is good."""
        if self.code is None:
            return f"not over after {SECONDS} s"
        if self.code == 0:
            return None
        if "Traceback (most recent call last)" in self.output:
            return "a traceback"
        if self.code != 2:
            return f"exit {self.code}"
        lines = refusal(self.output)
        if len(lines) > MOST_LINES:
            return f"{len(lines)} lines"
        if self.marks and not any(mark in line for mark in self.marks for line in lines):
            return f"names none of {self.marks}"
        if not SUGGESTS.search(" ".join(lines[: -1 if len(lines) > 1 else None])):
            return "suggests nothing"
        return None


def refusal(output: str) -> list[str]:
    """The lines from the first that begins with ``error:`` on; all where there is none."""
    lines = [line for line in output.splitlines() if line.strip()]
    start = next((i for i, line in enumerate(lines) if line.startswith("error:")), 0)
    return lines[start:]


def broken(draw: random.Random, config: dict[str, Any], folder: Path) -> Trial:
    """``config`` on a data file of which one row, or the whole, is damaged."""
    lines = Path(config["data"]["init_args"]["source"]).read_text().splitlines()
    row = draw.randrange(len(lines))
    kind = draw.choice(list(DAMAGES))
    lines[row] = DAMAGES[kind](lines[row])
    path = folder / "damaged.jsonl"
    text = "\n".join(lines).encode()
    if kind == "not utf-8":
        text = text.replace(b"tea", b"t\xe9a")
    elif kind == "empty file":
        text = b""
    elif kind == "cut file":
        text = text[: draw.randrange(1, len(text))]
    elif kind == "other bytes":
        text = draw.randbytes(2000)
    path.write_bytes(text)
    config = copy.deepcopy(config)
    config["data"]["init_args"]["source"] = str(path)
    marks = ["damaged.jsonl", "document", "summary", f"Row {row}"]
    if kind in ("half a line", "not an object"):
        marks = [f"line {row + 1} is no JSON"]
    return Trial(f"{kind}, row {row}", yaml.safe_dump(config), marks, kind)


def _without(line: str, column: str) -> str:
    return json.dumps({name: value for name, value in json.loads(line).items() if name != column})


def _with(line: str, column: str, value: Any) -> str:
    return json.dumps(json.loads(line) | {column: value})


DAMAGES: dict[str, Callable[[str], str]] = {
    "half a line": lambda line: line[: len(line) // 2],
    "no document": lambda line: _without(line, "document"),
    "no summary": lambda line: _without(line, "summary"),
    "null": lambda line: _with(line, "document", None),
    "a number": lambda line: _with(line, "document", 3),
    "a list": lambda line: _with(line, "document", ["tea"]),
    "nothing": lambda line: _with(line, "document", ""),
    "very long": lambda line: _with(line, "document", "tea " * 20_000),
    "not an object": lambda line: "[1, 2]",
    "an odd column": lambda line: _with(line, "extra", {"a": [1]}),
    **dict.fromkeys(("not utf-8", "empty file", "cut file", "other bytes"), str),
}


def leaves(node: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Paths to everything in a config but its root."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from leaves(value, (*path, key))


def mutated(config: dict[str, Any], draw: random.Random) -> Trial:
    """``config`` with one thing damaged."""
    kind, paths = draw.choice(KINDS), list(leaves(config))
    while True:
        path = draw.choice(paths)
        found = _mutated(copy.deepcopy(config), kind, path, draw)
        if found is not None:
            text, marks = found
            return Trial(f"{kind} {'.'.join(map(str, path))}", text, marks, kind)


def _mutated(
    config: dict[str, Any], kind: str, path: Path_, draw: random.Random
) -> tuple[str, list[str]] | None:
    *parents, key = path
    node: Any = config
    for parent in parents:
        node = node[parent]
    value = node[key]
    marks = [str(part) for part in path if not isinstance(part, int) and part not in COMMON][-2:]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == "delete":
        del node[key]
    elif kind == "rename":
        if not isinstance(key, str):
            return None
        new = _typo(key, draw)
        if isinstance(node, dict) and new in node:
            return None
        node[new] = node.pop(key)
        marks.append(new)
    elif kind == "retype":
        node[key] = draw.choice(list(_others(value)))
    elif kind in ("nan", "inf", "negative", "huge"):
        if not number:
            return None
        node[key] = {
            "nan": float("nan"),
            "inf": float("inf"),
            "negative": -abs(value) - 1,
            "huge": 10**15 if isinstance(value, int) else 1e30,
        }[kind]
        marks += ["memory"] if kind == "huge" else []
    elif kind == "class_path":
        if key != "class_path":
            return None
        node[key] = draw.choice(
            ["NoSuchThing", "torch.nn.Linear", "no.such.module.Thing", "os.path"]
        )
        marks.append(node[key])
    elif kind == "missing file":
        if not (isinstance(value, str) and "/" in value):
            return None
        node[key] = "no/such/file"
        marks.append("no/such/file")
    else:  # duplicate key
        if (
            not isinstance(node, dict)
            or isinstance(value, (dict, list))
            or not isinstance(key, str)
        ):
            return None
        return _duplicated(config, path), [f"{key} stands twice"]  # the first of that name
    return yaml.safe_dump(config, sort_keys=False), marks


def _typo(key: str, draw: random.Random) -> str:
    place = draw.randrange(len(key))
    return draw.choice([key[:place] + key[place + 1 :] or "x", f"{key[:place]}x{key[place:]}"])


def _others(value: Any) -> list[Any]:
    """Values of other types."""
    every: list[Any] = ["wrong", 3, 0.5, [1, "a"], {"a": 1}, True, None]
    return [other for other in every if type(other) is not type(value)]


def _duplicated(config: dict[str, Any], path: Path_) -> str:
    """The YAML with a second line for the same key."""
    lines = yaml.safe_dump(config, sort_keys=False).splitlines(keepends=True)
    pattern = re.compile(rf"^(\s*|\s*- ){re.escape(str(path[-1]))}:")
    for i, line in enumerate(lines):
        if pattern.match(line):
            return "".join([*lines[: i + 1], line.replace("- ", "  ", 1), *lines[i + 1 :]])
    return "".join(lines)
