"""Training loops in turns: every trainer's own loop, one optimizer step at a time."""

from __future__ import annotations

import gc
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from lightning.pytorch import Callback, Trainer
from shared import peak_resident, reset_peak
from speed import Machine, Size, prompt_rows, rewards

from clp_lightning import CLPCallback, CLPModule, Dirichlet, Policy, PromptDataModule, Rollout
from clp_lightning.conditioning import Conditioner, Unconditioned
from clp_lightning.functional import log_ratio

LR = 1e-6
CLIP = 1.0  # TRL's default


class Loop:
    """Somebody's own training loop, run one optimizer step at a time.

    The loop is a coroutine that waits behind every step, so that several trainers take turns in
    one process and one thread. (Threads would each have a team of OpenMP workers, and with more
    workers than processors none stays awake for the next product.) All of a step counts, from the
    end of one to the end of the next: the trainer's data loading, logging and bookkeeping too.
    Phases exclude what is called inside them, so that they sum to the step; what belongs to none is
    ``other``.

    Args:
        name: For tables.
        fit: Runs the loop; calls ``turn`` at the end of every step and ``time`` before the first.
        machine: Where it computes, and by which clock.

    Attributes:
        phases: Seconds by phase of the last step.
        tokens: ``generated`` and ``trained`` response tokens of the last step.
        kept: Models and optimizers that the loop holds.
    """

    def __init__(self, name: str, fit: Callable[[Loop], None], machine: Machine) -> None:
        self.name, self.machine = name, machine
        self.phases: dict[str, float] = defaultdict(float)
        self.tokens: dict[str, int] = {}
        self.kept: list[Any] = []
        self._stack, self._since = ["other"], 0.0
        self._here = greenlet(fit)

    def step(self) -> float:
        """Runs the loop to the end of its next step; returns the seconds."""
        self.phases.clear()
        self.tokens.clear()
        start = self._since = self.machine.now()
        self._enter()
        self._switch()
        return self._since - start

    def close(self) -> None:
        """Lets the loop, which has done its last step, come to its end."""
        self._enter()

    def _enter(self) -> None:
        # An error of the loop comes out here.
        self._here.parent = getcurrent()
        self._here.switch(*([] if self._here else [self]))

    def turn(self) -> None:
        """The end of a step: the others' turn."""
        self._here.parent.switch()

    def time(self, owner: Any, method: str, phase: str | Callable[[], str]) -> None:
        """Counts ``owner.method`` as ``phase``."""
        plain = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._stack.append(phase if isinstance(phase, str) else phase())
            try:
                return plain(*args, **kwargs)
            finally:
                self._switch()
                self._stack.pop()

        setattr(owner, method, timed)

    def count(self, name: str, tokens: int) -> None:
        """Notes response tokens of this step."""
        self.tokens[name] = self.tokens.get(name, 0) + tokens

    def _switch(self) -> None:
        now = self.machine.now()
        self.phases[self._stack[-1]] += now - self._since
        self._since = now

    def kept_bytes(self) -> int:
        """Bytes of the weights and optimizer states that the loop keeps between steps."""
        tensors: dict[int, torch.Tensor] = {}
        for owner in self.kept:
            if isinstance(owner, torch.nn.Module):
                found: Iterable[Any] = [*owner.parameters(), *owner.buffers()]
            else:
                found = [value for state in owner.state.values() for value in state.values()]
            tensors |= {id(t): t for t in found if isinstance(t, torch.Tensor)}
        return sum(t.numel() * t.element_size() for t in tensors.values())

    def peak_bytes(self) -> int:
        """Runs one step; the most memory that it takes beside what was there before."""
        gc.collect()
        if self.machine.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            return torch.cuda.max_memory_allocated() - before
        before = reset_peak()
        self.step()
        return peak_resident() - before


def take_turns(
    loops: Sequence[Loop],
    rounds: int,
    warmup: int,
    check: Callable[[Loop], None] = lambda loop: None,
) -> dict[str, list[dict[str, float]]]:
    """Runs the loops in alternation, a step each, every other round backwards.

    ``check`` sees a loop behind every step.

    Returns:
        By loop, the phases of every round after the ``warmup``, and their sum as ``step``.
    """
    found: dict[str, list[dict[str, float]]] = {loop.name: [] for loop in loops}
    for number in range(warmup + rounds):
        for loop in loops if number % 2 else reversed(loops):
            seconds = loop.step()
            check(loop)
            if number >= warmup:
                found[loop.name].append({**loop.phases, "step": seconds})
    return found


def median(rows: Iterable[dict[str, float]], phase: str) -> float:
    """Of one phase over the rounds; 0 where there is none."""
    return statistics.median(row.get(phase, 0.0) for row in rows)


def ratio(
    above: list[dict[str, float]], below: list[dict[str, float]], phase: str = "step"
) -> float:
    """Median of the quotients of paired rounds."""
    return statistics.median(a[phase] / b[phase] for a, b in zip(above, below, strict=True))


class Plain(CLPModule):
    """Our step without conditioning: all weights trained, a frozen copy of them the reference."""

    def configure_model(self) -> None:
        if self.policy.is_built:
            return
        super().configure_model()
        self.frozen = Policy(self.policy.pretrained, Unconditioned())
        self.frozen.build(self.rewards.names)
        self.frozen.requires_grad_(False)

    def measure(self, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
        with self.policy.conditioned(rollout.preference):
            own = self.policy.logprobs(rollout)
        with torch.no_grad(), self.frozen.conditioned(rollout.preference):
            ref = self.frozen.logprobs(rollout)
        return own, log_ratio(own.detach(), ref)


class _Turns(Callback):
    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        (optimizer,) = trainer.optimizers
        self.loop.time(optimizer, "step", "optimizer")
        self.loop.kept = [pl_module, optimizer]

    def on_train_batch_end(self, *_: Any) -> None:
        self.loop.turn()


def make_module(
    size: Size,
    folder: Path,
    conditioner: Conditioner,
    kind: type[CLPModule] = CLPModule,
    **more: Any,
) -> CLPModule:
    """The module of one of the benchmarks' steps."""
    return kind(
        str(folder),
        conditioner,
        more.pop("rewards", None) or rewards(size.num_rewards),  # type: ignore[arg-type]
        samples_per_prompt=size.samples,
        max_new_tokens=size.new_tokens,
        statistics_prompts=0,
        lr=LR,
        seed=0,
        **more,
    )


def make_trainer(
    steps: int, machine: Machine, *callbacks: Callback, per: Any = "prompt", **more: Any
) -> Trainer:
    """A quiet Trainer that clips gradients as TRL does, and samples weights uniformly."""
    return Trainer(
        accelerator="gpu" if machine.device == "cuda" else "cpu",
        max_steps=steps,
        gradient_clip_val=CLIP,
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[CLPCallback(weights=Dirichlet(1.0), per=per), *callbacks],
        **({"devices": 1, "precision": machine.precision} | more),
    )


def clp_loop(
    name: str,
    size: Size,
    folder: Path,
    conditioner: Conditioner,
    steps: int,
    machine: Machine,
    *,
    per: str = "prompt",
    **more: Any,
) -> Loop:
    """Lightning's Trainer around one of our modules.

    Args:
        name: For tables.
        size: Model and work.
        folder: Where the model lies.
        conditioner: Of the policy.
        steps: How often ``step`` will be called.
        machine: Where and by which clock.
        per: How many preferences a step has, as in ``CLPCallback``.
        **more: ``kind``, a subclass of CLPModule, and other arguments of it.
    """

    def fit(loop: Loop) -> None:
        module = make_module(size, folder, conditioner, **more)
        policy = module.policy
        generate, loss = module.generate, module.loss

        def generated(*args: Any) -> Rollout:
            rollout = generate(*args)
            loop.count("generated", int(rollout.response_mask.sum()))
            return rollout

        def trained(logp: Any, advantage: Any, rollout: Rollout, **options: Any) -> Any:
            loop.count("trained", int(rollout.response_mask.sum()))
            return loss(logp, advantage, rollout, **options)

        module.generate, module.loss = generated, trained  # type: ignore[method-assign]
        loop.time(module, "training_step", "other")
        loop.time(module, "generate", "generation")
        loop.time(module, "score", "rewards")
        loop.time(policy, "logprobs", lambda: "reference" if policy.is_reference else "policy")
        loop.time(module, "backward", "backward")
        if isinstance(module, Plain):
            module.configure_model()
            loop.time(module.frozen, "logprobs", "reference")
        data = PromptDataModule(prompt_rows(size), holdout=0, batch_size=size.prompts, seed=0)
        make_trainer(steps, machine, _Turns(loop), per=per).fit(module, datamodule=data)

    return Loop(name, fit, machine)
