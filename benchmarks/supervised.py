"""What the quickstart's warm-up teaches SmolLM2: held-out loss and ROUGE-L, before and after.

    python -m benchmarks.supervised [--seeds 3] [--prompts 32] [--steps 20]

The settings are those of configs/warmup.yaml; a seed is that of the adapter and of the order of the
documents, the held-out documents are the same for all. Writes supervised.md beside this file; ends
with status 1 where a seed did not improve both numbers.
"""

from __future__ import annotations

import argparse
import resource
from datetime import date
from pathlib import Path

from clp_lightning.cli import main as command_line
from clp_lightning.tables import markdown_table

from .shared import machine

OUT = Path(__file__).with_suffix(".md")
NAMES = ["val/loss", "val/rougeL"]


def measure(seed: int, steps: int, prompts: int, *, untrained: bool) -> list[list[float]]:
    """Loss and ROUGE-L of one seed's run, if asked for of the model before it too."""
    settings = {
        "seed_everything": seed,
        "trainer.logger.init_args.name": f"supervised/{seed}",
        "trainer.max_steps": steps,
        "trainer.limit_val_batches": "1.0",
        "trainer.val_check_interval": 1000,  # validated by hand, below
        "trainer.enable_progress_bar": "false",
        "model.rouge": "true",
        "data.eval_prompts": prompts,
        "data.eval_batch_size": 16,
    }
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    cli = command_line(["--config", "configs/warmup.yaml", *arguments], run=False)
    found = []
    for trained in [False, True] if untrained else [True]:
        if trained:
            cli.trainer.fit(cli.model, cli.datamodule)
        cli.trainer.validate(cli.model, cli.datamodule, verbose=False)
        found.append([float(cli.trainer.callback_metrics[name]) for name in NAMES])
        print(f"seed {seed}, {'after' if trained else 'before'}: {found[-1]}", flush=True)
    return found


def main() -> int:
    """Runs every seed and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=32, help="held-out documents")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of 8 documents")
    args = parser.parse_args()
    before: list[float] = []
    after = []
    for seed in range(args.seeds):
        *first, last = measure(seed, args.steps, args.prompts, untrained=not before)
        before = first[0] if first else before  # an untrained adapter does nothing, in any seed
        after.append(last)
    rows = [["before", *(f"{number:.3f}" for number in before)]]
    rows += [
        [f"after, seed {seed}", *(f"{number:.3f}" for number in last)]
        for seed, last in enumerate(after)
    ]
    usage = resource.getrusage(resource.RUSAGE_SELF)
    OUT.write_text(
        f"{markdown_table(['', 'loss, nats per token', 'ROUGE-L, greedy'], rows)}\n\n"
        "SmolLM2-135M-Instruct, `python -m benchmarks.supervised "
        f"--steps {args.steps} --prompts {args.prompts}`: steps of 8 documents, and held-out "
        f"documents. {date.today().isoformat()}, {machine()}: "
        f"{usage.ru_utime + usage.ru_stime:.0f} CPU seconds in all.\n"
    )
    print(OUT.read_text())
    return 0 if all(last[0] < before[0] and last[1] > before[1] for last in after) else 1


if __name__ == "__main__":
    raise SystemExit(main())
