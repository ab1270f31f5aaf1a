"""Where the time of our step goes, by kind of operation.

    python benchmarks/where.py [--size 10m] [--rounds 3]

Rollout, reference pass, and policy pass with its backward: by the clock, and then under torch's
profiler the processor's time by kind of operation. `calls` counts operations, so `us/call` says
whether the work itself or starting it is what costs. Products are given in GFLOP/s too, beside
those of one large product, which no pass can exceed.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import speed
import torch
from speed import Machine, Size
from torch.profiler import ProfilerActivity, profile

from clp_lightning import (
    LoRA,
    Mixture,
    Policy,
    Preference,
    PromptBatch,
    Rollout,
    Sampling,
    TransformersEngine,
)
from clp_lightning.functional import linear

_UNTIL_STEADY = 8
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


def passes(size: Size, folder: Path, machine: Machine) -> dict[str, Callable[[], None]]:
    """The parts of a step, by name."""
    conditioner = (
        LoRA(size.lora_rank, shared_rank=size.lora_rank) if size.lora_rank else Mixture("full")
    )
    policy = Policy(str(folder), conditioner)
    policy.build([f"r{i}" for i in range(size.num_rewards)])
    policy.to(machine.device)
    prompts = speed.prompt_rows(size, size.prompts)["prompt"][:]
    weights = torch.full((size.prompts, size.num_rewards), 1 / size.num_rewards)
    preference = Preference(weights, torch.full((size.prompts,), 0.1)).to(machine.device)
    batch = PromptBatch(prompts, torch.arange(size.prompts), preference=preference)
    engine, sampling = TransformersEngine(), Sampling(size.new_tokens)

    def sample() -> Rollout:
        with machine.autocast():
            return engine.generate(policy, batch, size.samples, sampling)

    rollout = sample()

    def reference() -> None:
        with machine.autocast(), policy.reference():
            policy.logprobs(rollout)

    def train() -> None:
        policy.zero_grad()
        with machine.autocast(), policy.conditioned(rollout.preference):
            logp = policy.logprobs(rollout)
        logp.sum().backward()

    return {
        "rollout": lambda: sample() and None,
        "reference": reference,
        "policy and backward": train,
    }


@dataclass
class Share:
    """What one kind of operation takes in one round."""

    milliseconds: float = 0.0
    calls: float = 0.0
    gflop: float = 0.0

    def line(self, kind: str, total: float) -> str:
        """For the table; ``total`` is that of all kinds."""
        each = f"{1e3 * self.milliseconds / self.calls:9.1f} us/call" if self.calls else ""
        rate = f"{1e3 * self.gflop / self.milliseconds:6.0f} GFLOP/s" if self.gflop else ""
        percent = 100 * self.milliseconds / total
        took = f"{self.milliseconds:9.1f} ms{percent:5.0f} %{self.calls:8.0f} calls"
        return f"  {kind:24}{took}{each}{rate}"


def large_product(machine: Machine, rounds: int = 5) -> float:
    """GFLOP/s of a product of 2048 x 2048 matrices, the best of some."""
    size = 2048
    factor = torch.randn(size, size, device=machine.device)
    took = []
    for _ in range(rounds):
        start = machine.now()
        with machine.autocast(), torch.no_grad():
            linear(factor, factor)
        took.append(machine.now() - start)
    return 2e-9 * size**3 / min(took)


def steady(run: Callable[[], None], machine: Machine) -> float:
    """Seconds of a pass by the clock, when memory and threads are as in the middle of a run.

    The first passes ask the system for memory, which can take longer than the work.
    """
    took = []
    for _ in range(_UNTIL_STEADY):
        start = machine.now()
        run()
        took.append(machine.now() - start)
    return statistics.median(took[_UNTIL_STEADY // 2 :])


def shares(run: Callable[[], None], rounds: int, device: str) -> dict[str, Share]:
    """What every kind of operation takes."""
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as record:
        for _ in range(rounds):
            run()
    # Apart, because noting shapes leaves memory in pieces, and the next pass waits for new memory.
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as counted:
        run()
    found: defaultdict[str, Share] = defaultdict(Share)
    event: Any
    for event in counted.key_averages():
        if event.key in ("aten::mm", "aten::addmm", "aten::bmm"):  # what others are made of
            found[kind_of(event.key)].gflop += event.flops / 1e9
    for event in record.key_averages():
        took = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        share = found[kind_of(event.key)]
        share.milliseconds += took / 1e3 / rounds
        if event.key.startswith("aten::"):
            share.calls += event.count / rounds
    return dict(found)


def main(arguments: list[str] | None = None) -> int:
    """Prints the shares."""
    args = speed.parser(__doc__).parse_args(arguments)
    size, machine = speed.chosen_size(args), speed.choose_machine(args)
    peak = large_product(machine)
    print(f"a large product: {peak:.0f} GFLOP/s")
    with tempfile.TemporaryDirectory() as scratch:
        folder = speed.save_model(Path(scratch), size)
        for name, run in passes(size, folder, machine).items():
            clock = 1e3 * steady(run, machine)
            found = shares(run, args.rounds, machine.device)
            total = sum(share.milliseconds for share in found.values())
            print(f"{name}: {clock:.0f} ms; inside operations, profiled: {total:.0f} ms")
            for kind, share in sorted(found.items(), key=lambda item: -item[1].milliseconds):
                print(share.line(kind, total))
            gflop = sum(share.gflop for share in found.values())
            print(f"  its products at the speed of a large one: {1e3 * gflop / peak:.0f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
