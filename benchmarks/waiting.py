"""A step that waits for a reward: all responses sampled first, or in chunks scored meanwhile.

    python benchmarks/waiting.py [--size 10m] [--each 0.03] [--chunks 1 2 4] [--rounds 10]

One of the rewards waits for every response, as for a judge behind a network. The sides differ in
``rollout_chunks`` only, and take turns. Smaller chunks hide more of the waiting, and sample more
slowly: every token of every chunk is a forward of its own.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import loops
import speed
import step

from clp_lightning import Mixture


def waiting(size: speed.Size, each: float) -> dict[str, Any]:
    """The usual rewards, the first of which waits ``each`` seconds for every response."""
    rewards: dict[str, Any] = dict(speed.rewards(size.num_rewards))
    name, plain = next(iter(rewards.items()))

    def judged(completions: list[str], **columns: Any) -> list[float]:
        time.sleep(each * len(completions))
        found: list[float] = plain(completions, **columns)
        return found

    return rewards | {name: judged}


def main(arguments: list[str] | None = None) -> int:
    """Runs and compares the sides."""
    parser = speed.parser(__doc__)
    parser.add_argument("--each", type=float, default=0.03, help="seconds for every response")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args(arguments)
    size, machine = speed.chosen_size(args), speed.choose_machine(args)
    steps = args.warmup + args.rounds + 1
    with tempfile.TemporaryDirectory() as scratch:
        folder = speed.save_model(Path(scratch), size)
        sides = [
            loops.clp_loop(
                f"chunks={chunks}",
                size,
                folder,
                Mixture("full"),
                steps,
                machine,
                per="batch",
                rewards=waiting(size, args.each),
                rollout_chunks=chunks,
            )
            for chunks in args.chunks
        ]
        found = loops.take_turns(
            sides, args.rounds, args.warmup, lambda loop: step.check_tokens([loop], size)
        )
        print(f"{size.responses} responses, each waits {1e3 * args.each:.0f} ms for its rewards")
        step.show(sides, found, size)
        for loop in sides:
            loop.close()
    first, *others = (loop.name for loop in sides)
    for name in others:
        print(f"ratio {first}/{name}: {loops.ratio(found[first], found[name]):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
