"""The training pass over unequal responses: those of like length together, or all at once.

    python benchmarks/lengths.py [--size 10m] [--rounds 10]

Scores and differentiates the same responses both ways, in alternation. Their lengths are drawn:
uniform from 4 to the longest, geometric with a quarter of it as their mean, and all the longest,
where nothing is to be gained. Prompts have between half and all of their tokens; there is one
preference, as in a batch of a run.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import loops
import speed
import torch
from speed import Machine, Size
from torch import Tensor

from clp_lightning import LoRA, Mixture, Policy, Preference, PromptBatch, Rollout, Sampling
from clp_lightning import TransformersEngine as Engine


def drawn(size: Size, draw: torch.Generator) -> dict[str, Tensor]:
    """Tokens of every response, by the law that they follow."""
    longest, shape = size.new_tokens, (size.responses,)
    geometric = torch.empty(shape).geometric_(1 / max(2, longest / 4), generator=draw).long()
    return {
        "uniform": torch.randint(min(4, longest), longest + 1, shape, generator=draw),
        "geometric": geometric.clamp(1, longest),
        "equal": torch.full(shape, longest),
    }


def sampled(policy: Policy, size: Size, device: str) -> Rollout:
    """Responses of the longest length to prompts of unequal length."""
    rows = [row.split() for row in speed.prompt_rows(size, size.prompts)["prompt"]]
    lengths = torch.randint(size.prompt_tokens // 2, size.prompt_tokens + 1, (size.prompts,))
    prompts = [" ".join(row[:n]) for row, n in zip(rows, lengths.tolist(), strict=True)]
    one = Preference.single([1 / size.num_rewards] * size.num_rewards, 0.1)
    preference = one[torch.zeros(size.prompts, dtype=torch.long)].to(device)
    batch = PromptBatch(prompts, torch.arange(size.prompts), preference=preference)
    return Engine().generate(policy, batch, size.samples, Sampling(size.new_tokens))


def timed(policy: Policy, rollout: Rollout, machine: Machine) -> dict[str, float]:
    """Seconds of a pass and its gradient."""
    policy.zero_grad()
    start = machine.now()
    with machine.autocast(), policy.conditioned(rollout.preference):
        logp = policy.logprobs(rollout)
    logp.masked_fill(~rollout.response_mask, 0).sum().backward()
    return {"step": machine.now() - start}


def main(arguments: list[str] | None = None) -> int:
    """Runs and compares both."""
    args = speed.parser(__doc__).parse_args(arguments)
    size, machine = speed.chosen_size(args), speed.choose_machine(args)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = speed.save_model(Path(scratch), size)
        policy = Policy(str(folder), LoRA() if size.lora_rank else Mixture("full"))
        policy.build([f"r{i}" for i in range(size.num_rewards)])
        policy.to(machine.device)
        whole = sampled(policy, size, machine.device)
    for law, lengths in drawn(size, torch.Generator().manual_seed(0)).items():
        longest = int(lengths.max())  # no rollout is wider
        ends = torch.arange(longest) < lengths.unsqueeze(-1)
        ids = whole.response_ids[:, :longest]
        rollout = replace(whole, response_ids=ids, response_mask=ends.to(machine.device))
        found: dict[bool, list[dict[str, float]]] = {True: [], False: []}
        for number in range(args.warmup + args.rounds):
            for policy.cut_by_length in (True, False) if number % 2 else (False, True):
                row = timed(policy, rollout, machine)
                if number >= args.warmup:
                    found[policy.cut_by_length].append(row)
        cut, at_once = (1e3 * loops.median(found[which], "step") for which in (True, False))
        print(
            f"{law:10}mean {lengths.float().mean():5.1f} of {size.new_tokens} tokens: "
            f"{at_once:8.1f} ms at once, {cut:8.1f} ms by length; "
            f"ratio {loops.ratio(found[False], found[True]):.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
