"""Where the time of our step goes, by kind of operation.

    python benchmarks/where.py [--size 10m] [--rounds 3]

Rollout, reference pass, and policy pass with its backward, each under torch's profiler: the
processor's time by kind of operation. `calls` counts operations, so `us/call` says whether the
work itself or starting it is what costs.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import speed
import torch
from speed import Size
from torch.profiler import ProfilerActivity, profile

from clp_lightning import (
    LoRA,
    Mixture,
    Policy,
    Preference,
    PromptBatch,
    Sampling,
    TransformersEngine,
)

KINDS = {
    "products": ("mm", "linear", "matmul", "addmm"),
    "attention": ("scaled_dot_product", "flash_attention"),
    "copies": ("copy_", "cat", "index", "clone", "gather", "fill_", "zero", "scatter"),
    "sampling, softmax": ("softmax", "cumsum", "searchsorted", "logsumexp", "amax"),
}


def kind_of(operation: str) -> str:
    """The first of ``KINDS`` that names it; the rest is elementwise work and bookkeeping."""
    found = (kind for kind, names in KINDS.items() if any(name in operation for name in names))
    return next(found, "elementwise and other")


def passes(size: Size, folder: Path, device: str) -> dict[str, Callable[[], None]]:
    """The parts of a step, by name."""
    conditioner = (
        LoRA(size.lora_rank, shared_rank=size.lora_rank) if size.lora_rank else Mixture("full")
    )
    policy = Policy(str(folder), conditioner)
    policy.build([f"r{i}" for i in range(size.num_rewards)])
    policy.to(device)
    prompts = speed.prompt_rows(size, size.prompts)["prompt"][:]
    weights = torch.full((size.prompts, size.num_rewards), 1 / size.num_rewards)
    preference = Preference(weights, torch.full((size.prompts,), 0.1)).to(device)
    batch = PromptBatch(prompts, torch.arange(size.prompts), preference=preference)
    engine, sampling = TransformersEngine(), Sampling(size.new_tokens)
    rollout = engine.generate(policy, batch, size.samples, sampling)

    def reference() -> None:
        with policy.reference():
            policy.logprobs(rollout)

    def train() -> None:
        policy.zero_grad()
        with policy.conditioned(rollout.preference):
            policy.logprobs(rollout).sum().backward()

    return {
        "rollout": lambda: engine.generate(policy, batch, size.samples, sampling) and None,
        "reference": reference,
        "policy and backward": train,
    }


def shares(run: Callable[[], None], rounds: int, device: str) -> dict[str, tuple[float, int]]:
    """Milliseconds and calls of every kind of operation, of one round."""
    run()
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as record:
        for _ in range(rounds):
            run()
    found: dict[str, tuple[float, int]] = {}
    event: Any
    for event in record.key_averages():
        took = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        before = found.get(kind_of(event.key), (0.0, 0))
        counted = event.count if event.key.startswith("aten::") else 0
        found[kind_of(event.key)] = (before[0] + took / 1e3 / rounds, before[1] + counted // rounds)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Prints the shares."""
    args = speed.parser(__doc__).parse_args(arguments)
    size, machine = speed.chosen_size(args), speed.choose_machine(args)
    with tempfile.TemporaryDirectory() as scratch:
        folder = speed.save_model(Path(scratch), size)
        for name, run in passes(size, folder, machine.device).items():
            found = shares(run, args.rounds, machine.device)
            total = sum(took for took, _ in found.values())
            print(f"{name}: {total:.0f} ms of {machine.device} time")
            for kind, (took, calls) in sorted(found.items(), key=lambda item: -item[1][0]):
                each = f"{1e3 * took / calls:9.1f} us/call" if calls else ""
                print(f"  {kind:24}{took:9.1f} ms{100 * took / total:5.0f} %{calls:8} calls{each}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
