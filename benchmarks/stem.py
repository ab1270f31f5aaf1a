"""A step of LoRA in the upper half of the blocks, the lower half computed once or in every pass.

    python benchmarks/stem.py [--size smollm2-lora] [--rounds 10]

Both sides are ours and take turns; `anew` has `policy.share_stem = False`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import loops
import speed
import step

from clp_lightning import CLPModule, LoRA


class Anew(CLPModule):
    """Computes every block in every pass."""

    def configure_model(self) -> None:
        super().configure_model()
        self.policy.share_stem = False


def main(arguments: list[str] | None = None) -> int:
    """Runs and compares both."""
    args = speed.parser(__doc__).parse_args(arguments)
    size, machine = speed.chosen_size(args), speed.choose_machine(args)
    steps, half = args.warmup + args.rounds + 1, size.fields["num_hidden_layers"] // 2
    with tempfile.TemporaryDirectory() as scratch:
        folder = speed.save_model(Path(scratch), size)
        sides = [
            loops.clp_loop(
                name,
                size,
                folder,
                LoRA(size.lora_rank or 8, last_blocks=half, shared_rank=0),
                steps,
                machine,
                per="prompt",
                kind=kind,
            )
            for name, kind in (("once", CLPModule), ("anew", Anew))
        ]
        found = loops.take_turns(
            sides, args.rounds, args.warmup, lambda loop: step.check_tokens([loop], size)
        )
        step.show(sides, found, size)
        for loop in sides:
            loop.close()
    print(f"ratio anew/once: {loops.ratio(found['anew'], found['once']):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
