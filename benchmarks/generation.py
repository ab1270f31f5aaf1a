"""Our rollouts beside Transformers' `generate`: the same prompts, weights and number of tokens.

    python benchmarks/generation.py [--size 10m] [--prompt-tokens 128 --new-tokens 64] [--target 2]

Both sample from softmax(logits) under one preference, merged into plain weights (LoRA stays beside
them on our side, and is merged on the other), and take turns. Ours computes each prompt once and
returns the log-probability of every token besides. Both end with the decoded texts. `--engines`
runs ours with other engines too; their first batch, with all compiling, is not in the medians.
`--prompts` runs it with the prompts' keys and values stored once for all responses, and with a
copy for each. Every token of a batch takes all weights once; how fast ours reads them is told
beside how fast memory can be read, which no decoding of a large model exceeds.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import loops
import speed
import torch
from speed import Machine, Size
from transformers import AutoModelForCausalLM, GenerationConfig

from clp_lightning import (
    LoRA,
    Mixture,
    Policy,
    Preference,
    PromptBatch,
    Sampling,
    TransformersEngine,
)


def built(size: Size, folder: Path, device: str) -> Policy:
    """Our side."""
    policy = Policy(str(folder), LoRA() if size.lora_rank else Mixture("full"))
    policy.build([f"r{i}" for i in range(size.num_rewards)])
    return policy.to(device)


def bytes_a_token(policy: Policy) -> int:
    """Of the weights that a forward of one token reads: all but a table that only embeds."""
    model = policy.model
    table, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    unread = 0 if table is output else table.nbytes
    return sum(weight.nbytes for weight in model.parameters()) - unread


def sides(
    policy: Policy,
    size: Size,
    folder: Path,
    prompts: list[str],
    machine: Machine,
    engines: list[str],
    both: bool,
) -> dict[str, Callable[[], int]]:
    """What is compared, by name; each returns the number of tokens that it sampled."""
    device = machine.device
    one = Preference.single([1 / size.num_rewards] * size.num_rewards, 0.1)
    preference = Preference(one.weights.expand(size.prompts, -1), one.alpha.expand(size.prompts))
    batch = PromptBatch(prompts, torch.arange(size.prompts), preference=preference.to(device))

    def ours(engine: TransformersEngine, share: bool | None = None) -> int:
        policy.share_prompts = share
        with machine.autocast():
            rollout = engine.generate(policy, batch, size.samples, Sampling(size.new_tokens))
        return int(rollout.response_mask.sum())

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    tokenizer = policy.tokenizer
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        max_new_tokens=size.new_tokens,
        num_return_sequences=size.samples,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )

    def theirs() -> int:
        inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(device)
        with machine.autocast():
            sequences = model.generate(**inputs, generation_config=config)
        response = sequences[:, inputs["input_ids"].shape[1] :]
        tokenizer.batch_decode(response, skip_special_tokens=True)
        return int(response.numel())

    others = {name: TransformersEngine(**speed.ENGINES[name]) for name in engines}
    mine = {name: partial(ours, engine) for name, engine in others.items()}
    if both:
        stored = {"prompts once": True, "prompts copied": False}
        mine |= {name: partial(ours, TransformersEngine(), share) for name, share in stored.items()}
    return {"ours": partial(ours, TransformersEngine()), **mine, "generate": theirs}


def timed(side: Callable[[], int], tokens: int, machine: Machine) -> dict[str, float]:
    """Seconds of one batch, which must have the right number of tokens."""
    start = machine.now()
    found = side()
    seconds = machine.now() - start
    if found != tokens:
        raise RuntimeError(f"{found} tokens were sampled, not {tokens}.")
    return {"step": seconds}


def main(arguments: list[str] | None = None) -> int:
    """Runs and compares them."""
    parser = speed.parser(__doc__)
    parser.add_argument("--target", type=float, help="exit with 1 where the ratio is below it")
    parser.add_argument("--prompts", action="store_true", help="stored once, and copied")
    speed.add_engines(parser)
    args = parser.parse_args(arguments)
    size, machine = speed.chosen_size(args), speed.choose_machine(args)
    prompts = speed.prompt_rows(size, size.prompts)["prompt"][:]
    with tempfile.TemporaryDirectory() as scratch:
        folder = speed.save_model(Path(scratch), size)
        policy = built(size, folder, machine.device)
        each = sides(policy, size, folder, prompts, machine, args.engines, args.prompts)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in each}
        for name in args.engines:
            print(f"first batch, {name}: {timed(each[name], size.tokens, machine)['step']:.1f} s")
        for number in range(args.warmup + args.rounds):
            for name in each if number % 2 else reversed(each):
                row = timed(each[name], size.tokens, machine)
                if number >= args.warmup:
                    found[name].append(row)
    for name, rows in found.items():
        seconds = loops.median(rows, "step")
        print(f"{name:14}{1e3 * seconds:9.1f} ms{size.tokens / seconds:9.0f} tokens/s")
    megabytes = bytes_a_token(policy) / 1e6
    rate = megabytes * size.new_tokens / loops.median(found["ours"], "step") / 1e3
    print(f"{megabytes:.0f} MB of weights a token: {rate:.1f} GB/s of {machine.read_rate():.1f}")
    for name in args.engines:
        print(f"ratio generate/{name}: {loops.ratio(found['generate'], found[name]):.2f}")
    if args.prompts:
        ratio = loops.ratio(found["prompts copied"], found["prompts once"])
        print(f"ratio prompts copied/once: {ratio:.2f}")
    ratio = loops.ratio(found["generate"], found["ours"])
    print(f"ratio generate/ours: {ratio:.2f}")
    return int(args.target is not None and ratio < args.target)


if __name__ == "__main__":
    sys.exit(main())
