"""What every conditioner costs in training and decoding, against the step without it.

    python benchmarks/conditioning.py [--size 10m] [--rewards 2 3 8] [--forms full/merge lora]

Each form and the unconditioned model take turns: the policy pass with its backward, AdamW, and
sampling; rewards and the reference, which no conditioner changes, are left out. The unconditioned
model trains all of its weights, beside LoRA and prompts too; with `--plain adapter` it trains one
adapter on all linear layers. Ratios are medians over paired rounds. Forms end with their mixing:
`merge` computes plain weights for one preference after the other, `row` takes all preferences at
once (layers merge for each where many positions stand under it, and mix rows elsewhere), `auto`
merges in training and mixes rows in decoding.

Break-even: up to so many response tokens per preference, `row` costs less than `merge`, whose price
is paid for every preference; `row` costs more by the token.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import speed
import torch
from speed import Machine, Size

from clp_lightning import (
    LoRA,
    Mixture,
    Policy,
    Preference,
    PromptBatch,
    PromptText,
    Rollout,
    Sampling,
    SoftPrompt,
    TransformersEngine,
    Weights,
)
from clp_lightning.conditioning import Conditioner, Unconditioned

PARTS = ("train", "optimizer", "decode", "whole")
TARGETS = ("full", "attention", "logits")
TRAINED = {"weights": "all weights", "adapter": "one adapter"}
FORMS: dict[str, Callable[[], Conditioner]] = {
    f"{target}/{mixing}": partial(Mixture, target, mixing=mixing)
    for target in TARGETS
    for mixing in ("merge", "row", "auto")
}
FORMS |= {"lora": LoRA, "soft prompt": SoftPrompt, "prompt": PromptText}


class Work:
    """One policy and the work of a step.

    Args:
        size: Model and work.
        folder: Where the model lies.
        conditioner: Of the policy.
        num_rewards: K.
        machine: Where and by which clock.
    """

    def __init__(
        self, size: Size, folder: Path, conditioner: Conditioner, num_rewards: int, machine: Machine
    ) -> None:
        self.size, self.machine = size, machine
        self.policy = Policy(str(folder), conditioner)
        self.policy.build([f"r{i}" for i in range(num_rewards)])
        self.policy.to(machine.device)
        self.num_rewards = num_rewards
        parameters = self.policy.trained_parameters().values()
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-6)
        self.batch = PromptBatch(
            speed.prompt_rows(size, size.prompts)["prompt"][:], torch.arange(size.prompts)
        )

    def round(self, preferences: int) -> dict[str, float]:
        """Seconds of the parts of one step under so many preferences, which divide the prompts."""
        now, size = self.machine.now, self.size
        each = torch.distributions.Dirichlet(torch.ones(self.num_rewards)).sample((preferences,))
        weights = each.repeat_interleave(size.prompts // preferences, 0)
        alpha = torch.full((size.prompts,), 0.1)
        self.batch.preference = Preference(weights, alpha).to(self.machine.device)
        with self.machine.autocast():
            start = now()
            rollout = TransformersEngine().generate(
                self.policy, self.batch, size.samples, Sampling(size.new_tokens)
            )
            sampled = now()
            for part in self._parts(rollout, preferences):
                with self.policy.conditioned(part.preference):
                    logp = self.policy.logprobs(part)
                logp.sum().backward()
        trained = now()
        self.optimizer.step()
        self.optimizer.zero_grad()
        stepped = now()
        return {
            "train": trained - sampled,
            "optimizer": stepped - trained,
            "decode": sampled - start,
            "whole": stepped - start,
        }

    def _parts(self, rollout: Rollout, preferences: int) -> Iterator[Rollout]:
        """What one training pass can answer for, as Lightning's batches would be."""
        together = not self.policy.conditioner.one_preference_per_batch
        for rows in torch.arange(len(rollout)).chunk(1 if together else preferences):
            yield rollout.select(rows)


def compare(form: Work, plain: Work, preferences: int, args: argparse.Namespace) -> dict[str, Any]:
    """Medians of the form's seconds, and of its ratios to the plain step, by part."""
    pairs = []
    for number in range(args.warmup + args.rounds):
        pair = [
            work.round(preferences) for work in ((form, plain) if number % 2 else (plain, form))
        ]
        pairs.append(pair if number % 2 else pair[::-1])
    pairs = pairs[args.warmup :]
    return {
        "seconds": {p: statistics.median(own[p] for own, _ in pairs) for p in PARTS},
        "ratios": {p: statistics.median(own[p] / other[p] for own, other in pairs) for p in PARTS},
    }


def break_even(merge: dict[int, Any], row: dict[int, Any], part: str, tokens: int) -> float | None:
    """Response tokens per preference at which merging and row mixing cost the same.

    In units of the unconditioned step, so that a machine whose speed drifts does not matter.

    Args:
        merge: Results of ``compare`` by number of preferences, 1 and P.
        row: Likewise.
        part: ``train`` or ``decode``.
        tokens: Response tokens of the batch.

    Returns:
        None where row mixing costs no more by the token, and so never loses.
    """
    most = max(merge)
    one, many = (merge[n]["ratios"][part] for n in (1, most))
    price = (many - one) / (most - 1)
    more = row[most]["ratios"][part] - (one - price)
    return round(price * tokens / more, 6) if more > 0 else None


def main(arguments: list[str] | None = None) -> int:
    """Measures the forms and prints their ratios and break-evens."""
    parser = speed.parser(__doc__)
    parser.add_argument("--rewards", type=int, nargs="+", default=[2, 3, 8])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--plain", choices=TRAINED, default="weights")
    args = parser.parse_args(arguments)
    size, machine = speed.chosen_size(args), speed.choose_machine(args)
    torch.manual_seed(0)
    counts = (1, size.prompts)
    work = f"{size.responses} responses, {size.tokens} tokens"
    print(f"ratios to the step without it, which trains {TRAINED[args.plain]}; {work}")
    head = "".join(f"{part:>11}" for part in PARTS)
    print(f"{'K':>2} {'form':16}{'preferences':>12}{head}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = speed.save_model(Path(scratch), size)
        for k in args.rewards:
            if args.plain == "adapter":
                single = LoRA(targets="all-linear", shared_rank=0, coefficients=Weights())
                plain = Work(size, folder, single, 1, machine)
            else:
                plain = Work(size, folder, Unconditioned(), k, machine)
            found: dict[str, dict[int, Any]] = {}
            for name in args.forms:
                form = Work(size, folder, FORMS[name](), k, machine)
                found[name] = {n: compare(form, plain, n, args) for n in counts}
                for n, result in found[name].items():
                    cells = "".join(f"{result['ratios'][part]:>11.2f}" for part in PARTS)
                    print(f"{k:>2} {name:16}{n:>12}{cells}", flush=True)
            show_break_even(found, k, size)
    return 0


def show_break_even(found: dict[str, dict[int, Any]], k: int, size: Size) -> None:
    """Prints it for every target that was both merged and mixed per row."""
    for target in TARGETS:
        merge, row = found.get(f"{target}/merge"), found.get(f"{target}/row")
        if merge is None or row is None:
            continue
        for part in ("train", "decode"):
            tokens = break_even(merge, row, part, size.tokens)
            shown = "row always" if tokens is None else f"{tokens:.0f} tokens per preference"
            print(f"break-even, K = {k}, {target}, {part}: {shown}")


if __name__ == "__main__":
    sys.exit(main())
