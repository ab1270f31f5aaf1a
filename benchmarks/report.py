"""Runs the benchmarks of speed and memory, and writes README.md from what they print.

    python benchmarks/report.py [--only step-10m conditioning ...] [--write]

Outputs are kept in build/benchmarks; `--only` runs some again and takes the others from there,
`--write` alone runs none. Numbers from another machine, of outputs in elsewhere/, stand beside.
"""

from __future__ import annotations

import argparse
import re
import string
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

from shared import machine

from clp_lightning.tables import markdown_table

HERE = Path(__file__).parent
OUT = HERE.parent / "build" / "benchmarks"
ELSEWHERE = HERE / "elsewhere"


@dataclass(frozen=True)
class Number:
    """A number that a benchmark prints, and its target.

    Attributes:
        what: For the table.
        pattern: A regular expression whose group is the number.
        target: The most, or the least where ``at_least``.
    """

    what: str
    pattern: str
    target: float
    at_least: bool = False

    def find(self, output: str) -> str | None:
        """As the output has it."""
        found = re.search(self.pattern, output, re.MULTILINE)
        return None if found is None else found[1]

    def row(self, output: str) -> list[str]:
        """What, target, measured, whether it is met."""
        found = self.find(output)
        sign = ">=" if self.at_least else "<="
        if found is None:
            return [self.what, f"{sign} {self.target:g}", "not measured", "-"]
        value = float(found)
        met = value >= self.target if self.at_least else value <= self.target
        return [self.what, f"{sign} {self.target:g}", found, "yes" if met else "**no**"]


def rloo(what: str, target: float, against: str = "rloo") -> Number:
    """The ratio to one of TRL's trainers."""
    return Number(what, rf"ratio TRL/ours: .*?([\d.]+) \({against}\)", target, at_least=True)


def with_engine(name: str, target: float) -> Number:
    """The ratio of RLOO's step to that of ours with another engine."""
    pattern = rf"^ratio others/clp-{name}: ([\d.]+) \(rloo\)"
    return Number(f"the same with `{name}` rollouts", pattern, target, at_least=True)


def whole(what: str, form: str, preferences: int, target: float) -> Number:
    """The last column of a form's row at K = 2."""
    return Number(what, rf"^ 2 {form} +{preferences} .* ([\d.]+)$", target)


LONG = ["--prompt-tokens", "128", "--new-tokens", "64"]
PREFERENCES = "conditioned against unconditioned, 8 preferences in 32 rows"
GENERATE = Number("rollouts against `generate`", r"ratio generate/ours: ([\d.]+)", 2, at_least=True)
JOBS: dict[str, tuple[list[str], list[Number]]] = {
    "step-10m": (
        ["step.py", "--size", "10m", "--engines", "compiled", "compiled-bf16"],
        [
            rloo("step against TRL RLOO fp32, 10M Llama, 32+32 tokens", 4),
            with_engine("compiled", 4),
            with_engine("compiled-bf16", 6),
            rloo("our default step against RLOO's defaults", 3, "rloo-defaults"),
        ],
    ),
    "step-10m-long": (
        ["step.py", "--size", "10m", *LONG, "--target", "5", "--engines", "compiled"],
        [rloo("prompt 128, 64 new tokens", 5), with_engine("compiled", 5)],
    ),
    "step-smollm2-lora": (
        ["step.py", "--size", "smollm2-lora", "--rounds", "4", "--rivals", "rloo"],
        [
            rloo("SmolLM2-135M, LoRA-CLP K = 3, against RLOO with PEFT LoRA", 3),
            Number("its step against that of one plain adapter", r"ratio clp/plain: ([\d.]+)", 1.1),
        ],
    ),
    "step-t5-tiny": (["step.py", "--size", "t5-tiny"], []),
    "conditioning": (
        ["conditioning.py"],
        [
            whole(f"{PREFERENCES}: full, merged", "full/merge", 8, 1.25),
            whole("the same: full, by row", "full/row", 8, 1.25),
            whole("the same: attention, by row", "attention/row", 8, 1.2),
            whole("full, merged, one preference", "full/merge", 1, 1.25),
        ],
    ),
    "conditioning-lora": (
        ["conditioning.py", "--forms", "lora", "--plain", "adapter"],
        [whole("LoRA, 8 preferences in 32 rows, against one plain adapter", "lora", 8, 1.1)],
    ),
    "memory": (
        ["memory.py"],
        [
            Number(
                "peak memory against LoRA and a separate reference", r"clp/separate: ([\d.]+)", 0.75
            ),
        ],
    ),
    "generation-10m": (
        ["generation.py", "--size", "10m", "--engines", "compiled", "--prompts"],
        [GENERATE],
    ),
    "generation-10m-long": (
        ["generation.py", "--size", "10m", *LONG, "--engines", "compiled", "--prompts"],
        [GENERATE],
    ),
    "generation-smollm2": (
        ["generation.py", "--size", "smollm2-lora", "--rounds", "4"],
        [GENERATE],
    ),
    "lengths": (["lengths.py", "--size", "10m", "--new-tokens", "64"], []),
    "stem": (["stem.py", "--size", "smollm2-lora", "--rounds", "4"], []),
    "waiting": (["waiting.py", "--size", "10m"], []),
    "quickstart": (
        ["quickstart.py"],
        [Number("quickstart against before this work", r"ratio now/before: ([\d.]+)", 0.6)],
    ),
    "scaling": (["scaling.py", "--rounds", "5", "--plot", str(HERE / "scaling.png")], []),
    "where-10m": (["where.py", "--size", "10m"], []),
    "where-smollm2": (["where.py", "--size", "smollm2-lora", "--rounds", "1"], []),
}


def run(name: str) -> None:
    """Runs one benchmark; its output goes to the screen and into ``OUT``."""
    command, _ = JOBS[name]
    print(f"== {name}: {' '.join(command)}", flush=True)
    done = subprocess.run(
        [sys.executable, str(HERE / command[0]), *command[1:]],
        capture_output=True,
        text=True,
    )
    print(done.stdout, flush=True)
    # 1 is a target that was missed, or a traceback.
    if done.returncode not in (0, 1) or "Traceback" in done.stderr:
        raise RuntimeError(f"{name} failed:\n{done.stderr}")
    OUT.mkdir(parents=True, exist_ok=True)
    where = f"{date.today().isoformat()}, {machine()}"
    (OUT / f"{name}.txt").write_text(f"{where}\n{done.stdout}")


def write() -> None:
    """README.md from the kept outputs."""
    outputs, others = _kept(OUT), _kept(ELSEWHERE)
    rows = [
        [
            *number.row(outputs.get(name, "")),
            number.find(others.get(name, "")) or "-",
            f"`{' '.join(_shown(command))}`",
        ]
        for name, (command, numbers) in JOBS.items()
        for number in numbers
    ]
    (there,) = {text.splitlines()[0] for text in others.values()}
    sections = {
        f"out_{name.replace('-', '_')}": f"```\n{outputs.get(name, 'not run').strip()}\n```"
        for name in JOBS
    }
    plot = "![cost of a step against each of its sizes](scaling.png)"
    libraries = ("torch", "transformers", "lightning", "trl", "peft")
    text = string.Template((HERE / "README.template.md").read_text()).substitute(
        sections,
        scaling_plot=plot if (HERE / "scaling.png").exists() else "",
        targets=markdown_table(["what", "target", "measured", "met", there, "command"], rows),
        versions=", ".join(f"{name} {version(name)}" for name in libraries),
        date=_dates(),
    )
    (HERE / "README.md").write_text(text)
    print(f"report: {HERE / 'README.md'}")


def _kept(folder: Path) -> dict[str, str]:
    return {name: path.read_text() for name in JOBS if (path := folder / f"{name}.txt").exists()}


def _dates() -> str:
    """When the oldest and the newest of the kept outputs were written."""
    times = sorted(path.stat().st_mtime for path in OUT.glob("*.txt"))
    days = [date.fromtimestamp(time).isoformat() for time in times] or ["never"]
    return days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"


def _shown(command: list[str]) -> list[str]:
    here = f"{HERE}/"
    return [f"benchmarks/{command[0]}", *(part.removeprefix(here) for part in command[1:])]


def main() -> None:
    """Runs what was asked for and writes the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=JOBS)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    for name in args.only or ([] if args.write else JOBS):
        run(name)
    write()


if __name__ == "__main__":
    main()
