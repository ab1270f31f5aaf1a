"""Seeded damage to our configs and data, and what the command line answers.

Every trial runs in a child that is forked after the imports. A trial is good where it ends in time,
in a run (exit 0) or in a refusal: exit 2, no traceback, few lines, which name what was damaged.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

# Before the fork, or every child would take their seconds.
import clp_lightning.cli  # noqa: F401
from tests.tiny import save_tiny

CONFIGS = Path(__file__).parents[1] / "configs"
SHORT = ["--trainer.max_steps=1", "--trainer.limit_val_batches=1"]
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
Path_ = tuple[Any, ...]


@dataclass
class Trial:
    """A damaged config, and how it fared.

    Attributes:
        name: What was done, for the report.
        text: The YAML file.
        marks: Any of these must stand in a refusal.
        code: Exit status; None where time was up.
        output: What the command printed.
        seconds: How long it took.
    """

    name: str
    text: str
    marks: list[str]
    code: int | None = None
    output: str = ""
    seconds: float = 0.0

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
        return None


def refusal(output: str) -> list[str]:
    """The lines from the first that begins with ``error:`` on; all where there is none."""
    lines = [line for line in output.splitlines() if line.strip()]
    start = next((i for i, line in enumerate(lines) if line.startswith("error:")), 0)
    return lines[start:]


def bases(folder: Path) -> dict[str, dict[str, Any]]:
    """Configs of ours on a tiny model and a small file, both written below ``folder``."""
    base, data = save_tiny(folder / "base", "llama"), folder / "rows.jsonl"
    rows = [
        {"document": f"tea fog ink owl jam {i} zip sun " * 3, "summary": f"fog {i} ink"}
        for i in range(40)
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    found = {}
    for name in ("quickstart", "warmup"):
        config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        source = config["data"]["init_args"]
        source |= {"source": str(data), "template": "{document}", "holdout": 8, "batch_size": 2}
        del source["conversational"]
        model = config["model"]["init_args"]
        model["pretrained"] = str(base)
        if name == "quickstart":
            source |= {"eval_prompts": 4, "eval_batch_size": 4}
            model["rewards"]["support"] = {
                "class_path": "Rouge",
                "init_args": {"reference": "summary"},
            }
            model["conditioner"]["init_args"]["last_blocks"] = 1
            model |= {"statistics_prompts": 2, "max_new_tokens": 4, "samples_per_prompt": 2}
            model |= {"eval_samples": 1, "grid": {"divisions": 1, "alphas": [0.05]}}
        found[name] = config
    return found


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
    return Trial(f"{kind}, row {row}", yaml.safe_dump(config), marks)


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
    while True:
        kind = draw.choice(KINDS)
        path = draw.choice(list(leaves(config)))
        found = _mutated(copy.deepcopy(config), kind, path, draw)
        if found is not None:
            text, marks = found
            return Trial(f"{kind} {'.'.join(map(str, path))}", text, marks)


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
        return _duplicated(config, path), marks
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


def run(trial: Trial, folder: Path) -> None:
    """Runs ``fit`` on the trial's config in a child, and fills in how it fared."""
    config, log = folder / "config.yaml", folder / "log.txt"
    config.write_text(trial.text)
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        _answer(["fit", "--config", str(config), *SHORT], folder, log)
    code = _waited(child, start + SECONDS)
    trial.code, trial.seconds = code, time.monotonic() - start
    trial.output = log.read_text(errors="replace")


def _answer(args: list[str], folder: Path, log: Path) -> None:
    """The child: never returns."""
    code = 1
    try:
        stream = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        os.chdir(folder)
        sys.argv = ["clp_lightning"]
        from clp_lightning.__main__ import run as command

        command(args)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _waited(child: int, until: float) -> int | None:
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def main(configs: int, files: int, seed: int) -> list[Trial]:
    """Runs so many trials and tells of every bad answer; returns all."""
    torch.set_num_threads(1)
    draw, trials = random.Random(seed), []
    with tempfile.TemporaryDirectory() as scratch:
        config_of = bases(Path(scratch))
        for number in range(configs + files):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            config = config_of[draw.choice(list(config_of))]
            damaged = mutated(config, draw) if number < configs else broken(draw, config, folder)
            run(damaged, folder)
            trials.append(damaged)
            if damaged.fault:
                print(f"-- {damaged.name}: {damaged.fault}\n{damaged.output[-1500:]}", flush=True)
    tally = Counter(
        "bad" if trial.fault else "a run" if trial.code == 0 else "a refusal" for trial in trials
    )
    slowest = max(trial.seconds for trial in trials)
    print(f"{len(trials)} trials: {dict(tally)}; the slowest took {slowest:.1f} s")
    return trials


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configs", type=int, default=2000)
    parser.add_argument("--files", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    sys.exit(any(trial.fault for trial in main(**vars(parser.parse_args()))))
