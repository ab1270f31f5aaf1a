"""Our step beside TRL's: RLOO in our precision, RLOO with its defaults, and GRPO.

    python benchmarks/step.py [--size 10m] [--target RATIO] [--rounds 10] [--device cpu]

All take turns in one process, each in its own trainer's own loop (``Loop`` in loops.py): TRL's
``train()`` and Lightning's ``fit()``, so that everything a user pays for counts on both sides. Same
model, prompts, python rewards, clipping and KL to a reference; every step must sample and train on
the same number of tokens, or the script stops. Sizes:

- 10m: a Llama of 10.5 million parameters, all trained, K = 2, one preference a step.
- smollm2-lora: the shape of SmolLM2-135M with LoRA of rank 8 on all linear layers of the blocks,
  PEFT's in TRL; ours has K = 3 such adapters on the attention layers besides, and a preference per
  prompt.
- t5-tiny: our step with and without conditioning only: TRL does not train encoder-decoder models.

`plain` is our step without conditioning: all weights and a second model as the reference, or one
LoRA adapter and one reward that is the sum of all. The target is for RLOO in our precision, and
the size's own where none is given.
`--engines` runs `clp` with other rollouts too; their first step, with all compiling, is not in the
medians.
"""

from __future__ import annotations

import sys
import tempfile
from itertools import cycle
from pathlib import Path
from typing import Any

import loops
import speed
import torch
from loops import Loop
from speed import Machine, Size

from clp_lightning import LoRA, Mixture, TransformersEngine
from clp_lightning.conditioning import Unconditioned, Weights

PHASES = ("generation", "rewards", "old", "reference", "policy", "backward", "optimizer", "other")
BETA = 0.05
RIVALS = ("rloo", "rloo-defaults", "grpo")


class TRLLoop(Loop):
    """A loop of TRL's; Accelerate's state, global to the process, is each trainer's own."""

    def __init__(self, *args: Any) -> None:
        from accelerate.state import AcceleratorState, GradientState, PartialState

        owners: Any = (PartialState, AcceleratorState, GradientState)
        self._shared = [owner._shared_state for owner in owners]
        self._own: list[dict[str, Any]] = [{} for _ in owners]
        super().__init__(*args)

    def step(self) -> float:
        for shared, own in zip(self._shared, self._own, strict=True):
            shared.clear()
            shared.update(own)
        try:
            return super().step()
        finally:
            self._own = [dict(shared) for shared in self._shared]


def trl_loop(name: str, size: Size, folder: Path, steps: int, machine: Machine, run: Path) -> Loop:
    """TRL's trainer in its own loop; ``name`` is one of ``RIVALS``."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    config_class, trainer_class = (
        (GRPOConfig, GRPOTrainer) if name == "grpo" else (RLOOConfig, RLOOTrainer)
    )
    alike = {"bf16": machine.device == "cuda", "gradient_checkpointing": False}

    def fit(loop: Loop) -> None:
        class Turns(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                loop.time(more["optimizer"], "step", "optimizer")
                references = [r for r in [getattr(trainer, "ref_model", None)] if r is not None]
                loop.kept = [trainer.model, *references, more["optimizer"]]

            def on_step_end(self, *_: Any, **__: Any) -> None:
                loop.turn()

        args: Any = config_class(
            output_dir=str(run / name),
            max_steps=steps,
            per_device_train_batch_size=size.responses,
            num_generations=size.samples,
            max_completion_length=size.new_tokens,
            beta=BETA,
            learning_rate=loops.LR,
            use_cpu=machine.device == "cpu",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **({} if name == "rloo-defaults" else alike),
        )
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        lora = LoraConfig(
            r=size.lora_rank, lora_alpha=2 * size.lora_rank, target_modules="all-linear"
        )
        functions: Any = list(speed.rewards(size.num_rewards).values())
        trainer: Any = trainer_class(
            model=model,
            reward_funcs=functions,
            args=args,
            train_dataset=speed.prompt_rows(size),
            peft_config=lora if size.lora_rank else None,
            callbacks=[Turns()],
        )
        trainer.remove_callback(PrinterCallback)
        _watch(
            trainer,
            loop,
            ["reference", "policy"] if name == "grpo" else ["old", "reference", "policy"],
        )
        trainer.train()

    return TRLLoop(name, fit, machine)


def _watch(trainer: Any, loop: Loop, passes: list[str]) -> None:
    """Counts tokens and times phases; the passes over the responses come in a fixed order."""
    single_turn, compute_loss = trainer._generate_single_turn, trainer._compute_loss

    def generated(*args: Any, **more: Any) -> Any:
        found = single_turn(*args, **more)
        responses = found[0] if isinstance(found, tuple) else found
        loop.count("generated", sum(map(len, responses)))
        return found

    def trained(model: Any, inputs: Any) -> Any:
        loop.count("trained", int(inputs["completion_mask"].sum()))
        return compute_loss(model, inputs)

    trainer._generate_single_turn, trainer._compute_loss = generated, trained
    order = cycle(passes)
    loop.time(trainer, "_generate_single_turn", "generation")
    loop.time(trainer, "_calculate_rewards", "rewards")
    loop.time(trainer, "_get_per_token_logps_and_entropies", lambda: next(order))
    loop.time(trainer.accelerator, "backward", "backward")
    loop.time(trainer, "_clip_grad_norm", "optimizer")


def our_loops(
    size: Size, folder: Path, steps: int, machine: Machine, engines: list[str]
) -> list[Loop]:
    """Our step, the same without conditioning, and with other engines."""
    rank = size.lora_rank
    per = "prompt" if rank else "batch"

    def clp(name: str, more_steps: int = 0, **more: Any) -> Loop:
        full = (
            LoRA(rank, shared_rank=rank, shared_targets="all-linear") if rank else Mixture("full")
        )
        return loops.clp_loop(
            name, size, folder, full, steps + more_steps, machine, per=per, **more
        )

    others = [
        clp(f"clp-{name}", 1, engine=TransformersEngine(**speed.ENGINES[name])) for name in engines
    ]
    if not rank:
        more = {"per": per, "kind": loops.Plain}
        plain = loops.clp_loop("plain", size, folder, Unconditioned(), steps, machine, **more)
        return [clp("clp"), plain, *others]
    functions = list(speed.rewards(size.num_rewards).values())

    def total(completions: list[str], **more: Any) -> list[float]:
        return [
            sum(each) for each in zip(*(f(completions, **more) for f in functions), strict=True)
        ]

    single = LoRA(rank, targets="all-linear", shared_rank=0, coefficients=Weights())
    summed: Any = {"rewards": {"total": total}}
    plain = loops.clp_loop("plain", size, folder, single, steps, machine, **summed)
    return [clp("clp"), plain, *others]


def check_tokens(sides: list[Loop], size: Size) -> None:
    """Stops where a step sampled or trained on another number of tokens than the others."""
    for loop in sides:
        if set(loop.tokens) != {"generated", "trained"} or set(loop.tokens.values()) != {
            size.tokens
        }:
            raise RuntimeError(f"{loop.name}: {loop.tokens}, not {size.tokens} tokens of each.")


def show(sides: list[Loop], found: dict[str, list[dict[str, float]]], size: Size) -> None:
    """Prints medians by phase, tokens a second and memory (which takes one more step)."""
    print(f"medians in ms; MB kept + MB at the peak of a step; {size.tokens} tokens a step")
    head = [*PHASES, "step", "tokens/s", "memory"]
    print(f"{'':14}" + "".join(f"{name:>11}" for name in head))
    for loop in sides:
        rows = found[loop.name]
        cells = [f"{1e3 * loops.median(rows, phase):.1f}" for phase in (*PHASES, "step")]
        cells.append(f"{size.tokens / loops.median(rows, 'step'):.0f}")
        cells.append(f"{loop.kept_bytes() / 1e6:.0f}+{loop.peak_bytes() / 1e6:.0f}")
        print(f"{loop.name:14}" + "".join(f"{cell:>11}" for cell in cells))


def main(arguments: list[str] | None = None) -> int:
    """Runs and compares them."""
    parser = speed.parser(__doc__)
    parser.add_argument(
        "--target", type=float, help="exit with 1 where the ratio to RLOO is below it"
    )
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=list(RIVALS))
    speed.add_engines(parser)
    args = parser.parse_args(arguments)
    size = speed.chosen_size(args)
    rivals = [] if size.seq2seq else args.rivals
    machine = speed.choose_machine(args)
    steps, others = args.warmup + args.rounds + 1, [f"clp-{name}" for name in args.engines]
    with tempfile.TemporaryDirectory() as scratch:
        folder = speed.save_model(Path(scratch) / "model", size)
        sides = our_loops(size, folder, steps, machine, args.engines)
        for loop in sides:
            if loop.name in others:
                print(f"first step, {loop.name}: {loop.step():.1f} s")
        sides += [trl_loop(name, size, folder, steps, machine, Path(scratch)) for name in rivals]
        found = loops.take_turns(
            sides, args.rounds, args.warmup, lambda loop: check_tokens([loop], size)
        )
        show(sides, found, size)
        for loop in sides:
            loop.close()
    print(f"ratio clp/plain: {loops.ratio(found['clp'], found['plain']):.2f}")
    for name in others:
        against = {side: loops.ratio(found[side], found[name]) for side in (*rivals, "clp")}
        values = ", ".join(f"{value:.2f} ({side})" for side, value in against.items())
        print(f"ratio others/{name}: {values}")
    ratios = {name: loops.ratio(found[name], found["clp"]) for name in rivals}
    shown = ", ".join(f"{value:.2f} ({name})" for name, value in ratios.items())
    print(f"ratio TRL/ours: {shown or 'none, TRL does not run here'}")
    target = size.target if args.target is None else args.target
    return int("rloo" in ratios and ratios["rloo"] < target)


if __name__ == "__main__":
    sys.exit(main())
