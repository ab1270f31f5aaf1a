"""The quickstart by five methods and two seeds, compared; writes the README beside this file.

    python -m benchmarks.smollm2.run [--jobs 2] [--only PATTERN] [--report]

A run whose front lies in runs/smollm2 is not repeated, so a benchmark that was stopped goes on
where it was. One core per job.
"""

from __future__ import annotations

import argparse
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..shared import run_command
from .report import write_report

RUNS = Path("runs")
METHODS = {
    "lora": ("LoRA-CLP", "configs/quickstart.yaml"),
    "attention": ("attention-CLP", "configs/smollm2/attention.yaml"),
    "soft_prompt": ("soft-prompt-CLP", "configs/smollm2/soft_prompt.yaml"),
    "prompt": ("prompt-CLP", "configs/smollm2/prompt.yaml"),
    "soups": ("Rewarded Soups", "configs/smollm2/soups.yaml"),
}
SEEDS = (0, 1)
EVAL_PROMPTS = 32  # of the quickstart's 48: the fronts take a third of the time


def fit(config: str, log: Path, *arguments: str) -> bool:
    """One training run with its front; False where it failed."""
    done = run_command(["fit", "--config", config, *arguments], log)
    print(f"{config} {' '.join(arguments)}: {'' if done else 'FAILED, see '}{log}")
    return done


def perform(method: str, seed: int) -> bool:
    """Trains and measures a method, unless that was done; False where it failed."""
    name = f"smollm2/{method}-{seed}"
    if (RUNS / name / "front.json").exists():
        return True
    config = METHODS[method][1]
    changes = {
        "seed_everything": seed,
        "trainer.logger.init_args.name": name,
        "data.init_args.eval_prompts": EVAL_PROMPTS,
    }
    return fit(config, RUNS / f"{name}.log", *(f"--{key}={v}" for key, v in changes.items()))


def main() -> int:
    """Runs what is missing, then writes the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--only", default="", help="regular expression on METHOD-SEED")
    parser.add_argument("--report", action="store_true", help="write the report, train nothing")
    args = parser.parse_args()
    base = RUNS / "warmup" / "base" / "config.json"
    planned = [(method, seed) for seed in SEEDS for method in METHODS]
    chosen = [(m, seed) for m, seed in planned if re.search(args.only, f"{m}-{seed}")]
    done = True
    if not args.report:
        if not base.exists() and not fit("configs/warmup.yaml", RUNS / "smollm2" / "warmup.log"):
            return 1
        with ThreadPoolExecutor(args.jobs) as pool:
            done = all([*pool.map(lambda run: perform(*run), chosen)])
    write_report(
        {
            label: {seed: RUNS / "smollm2" / f"{method}-{seed}" for seed in SEEDS}
            for method, (label, _) in METHODS.items()
        },
        {method: Path(config) for method, (_, config) in METHODS.items()},
    )
    return 0 if done else 1


if __name__ == "__main__":
    raise SystemExit(main())
