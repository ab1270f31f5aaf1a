"""Watchmen: one clear warning for each known way in which a run fails."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from ..described import check_choice
from ..functional import has_dial
from ..metrics import FrontReport

__all__ = ["Watchmen"]


class _Advice(NamedTuple):
    """A row of docs/howto/trouble.md: what a failure is, and what to do about it."""

    meaning: str
    remedy: str


_ADVICE = {
    "length": _Advice(
        "a reward is won by saying nothing",
        "another reward that is lost by it; look at `length` of every point",
    ),
    "entropy": _Advice(
        "alpha too small too early, or `lr` too high", "`AnnealedAlpha`; a smaller `lr`"
    ),
    "kl": _Advice(
        "a hacked reward", "a larger alpha; a reward that sees what is odd; read the samples"
    ),
    "without_spread": _Advice(
        "all responses to a prompt get the same score",
        "more `samples_per_prompt`, a finer reward, a warm-up, a higher temperature",
    ),
    "dial": _Advice(
        "one policy for all: the shared part learnt, the copies did not",
        "higher `lr` or lower `lr_shared`; `Dirichlet` with a smaller concentration; "
        "do the rewards conflict at all (`predicted`)?",
    ),
}


class Watchmen(Callback):
    """Warns, once each, when a run fails in a known way, and may stop it.

    Four watchmen look at every optimizer step: at the response length, the entropy, the KL, and
    each reward's spread. They judge the mean over a window of steps, its least and its largest
    value left out, so that one odd step says nothing. A fifth looks at the front after every
    validation, with its interval: a dial without effect. All of them read what the module has
    already reduced over all processes, so every process decides alike.

    What was warned of is kept in the checkpoint and is not repeated, nor does it stop again: to
    resume a stopped run is to let it go on.

    The module measures: it sets ``step_report`` once per optimizer step and ``front_report`` at
    the end of a validation, and it has ``samples_per_prompt``.

    Args:
        action: Whether a failure is only told, or also ends the run: cleanly, with its last
            checkpoint and its front.
        window: Optimizer steps that are judged together; at least 3.
        min_length: Least mean response length, as a share of that of the first step; 0 never
            warns.
        min_entropy: Least mean token entropy, as a share of that of the first step; 0 never
            warns.
        max_kl: Largest mean KL, in nats per response; inf never warns.
        max_without_spread: Largest share of the groups in which a reward gives all responses to
            a prompt the same score; 1 never warns.
        min_dial: Least steering gain of a policy that has gained value, as a share of the
            predicted one; its whole 95 % interval must be below. 0 warns only of a reversed dial.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        action: Literal["warn", "stop"] = "warn",
        window: int = 10,
        min_length: float = 0.25,
        min_entropy: float = 0.03,
        max_kl: float = 15.0,
        max_without_spread: float = 0.9,
        min_dial: float = 0.1,
    ) -> None:
        self.action = check_choice("action", action, ["warn", "stop"])
        if window < 3:
            raise ValueError(
                f"window must be at least 3, because its extremes are left out; got {window}."
            )
        shares = {
            "min_length": min_length,
            "min_entropy": min_entropy,
            "max_without_spread": max_without_spread,
            "min_dial": min_dial,
        }
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is a share, in [0, 1]; got {share}.")
        if not max_kl > 0:
            raise ValueError(f"max_kl must be above 0; got {max_kl}.")
        self.window = window
        self.min_length, self.min_entropy = min_length, min_entropy
        self.max_kl, self.max_without_spread, self.min_dial = max_kl, max_without_spread, min_dial
        self._forget()

    def _forget(self) -> None:
        self._step = 0
        self._first: dict[str, float] = {}
        self._recent: dict[str, list[tuple[int, float]]] = {}
        self._warned: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets an earlier run."""
        for name in ("step_report", "front_report"):
            if not hasattr(pl_module, name):
                raise RuntimeError(
                    f"Watchmen have nothing to look at: {type(pl_module).__name__} must set "
                    f"`{name}`, as CLPModule does."
                )
        self._forget()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on: what a resumed module reports until its first step is an older one's."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks at the optimizer step, if this batch ended one."""
        module: Any = pl_module
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        for name, value in module.step_report.items():
            kind = name.partition("/")[0]
            # A response without siblings has no score to differ from.
            if kind not in _ADVICE or (kind == "without_spread" and module.samples_per_prompt < 2):
                continue
            self._first.setdefault(name, value)
            recent = self._recent.setdefault(name, [])
            recent.append((self._step - 1, value))
            del recent[: -self.window]
            if len(recent) == self.window:
                inner = sorted(value for _, value in recent)[1:-1]
                seen = self._judge(name, sum(inner) / len(inner))
                if seen:
                    self._tell(trainer, name, f"Since step {recent[0][0]} {seen}.")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at the front, except in Lightning's sanity check."""
        module: Any = pl_module
        seen = None if trainer.sanity_checking else self._judge_dial(module.front_report)
        if seen:
            self._tell(trainer, "dial", f"At step {module.trained_steps} {seen}.")

    def _judge(self, name: str, mean: float) -> str | None:
        """What is wrong with the mean of the window; None if nothing is."""
        kind, _, reward = name.partition("/")
        first = self._first[name]
        if kind == "length" and mean < self.min_length * first:
            return (
                f"the response length has collapsed: {mean:.1f} tokens on average, "
                f"below {self.min_length:g} of the {first:.1f} at first (min_length)"
            )
        if kind == "entropy" and mean < self.min_entropy * first:
            return (
                f"the entropy has collapsed: {mean:.2g} nats per token on average, "
                f"below {self.min_entropy:g} of the {first:.2g} at first (min_entropy)"
            )
        if kind == "kl" and mean > self.max_kl:
            return (
                f"the KL is beyond its bound: {mean:.1f} nats per response on average, "
                f"above {self.max_kl:g} (max_kl)"
            )
        if kind == "without_spread" and mean > self.max_without_spread:
            return (
                f"the reward '{reward}' has no spread: it cannot tell the responses to a prompt "
                f"apart in {mean:.0%} of the groups, above {self.max_without_spread:.0%} "
                "(max_without_spread)"
            )
        return None

    def _judge_dial(self, front: FrontReport) -> str | None:
        """Whether value was gained, and certainly next to none of it by the dial."""
        value, steering = front.value_gain, front.steering_gain
        if not has_dial(front.grid) or value.mean is None or steering.high is None:
            return None
        if not (value.excludes_zero() and value.mean > 0):
            return None
        # Unknown where some of several alphas are 0; the value gain is of the same order.
        natural = value.mean if front.predicted_gain is None else front.predicted_gain
        if steering.high >= self.min_dial * natural:
            return None
        return (
            f"the dial is without effect: value gain {value.mean:.2g}, but steering gain "
            f"{steering.mean:.2g} (at most {steering.high:.2g}), below {self.min_dial:g} of "
            f"{natural:.2g}, its natural size (min_dial)"
        )

    def _tell(self, trainer: Trainer, name: str, seen: str) -> None:
        if name in self._warned:
            return
        self._warned.append(name)
        advice = _ADVICE[name.partition("/")[0]]
        message = f"{seen} What it usually is: {advice.meaning}. What to do: {advice.remedy}"
        message = message if message.endswith("?") else f"{message}."
        # The front at the end of a run is measured outside ``fit``, with nothing left to stop.
        if self.action == "stop" and trainer.state.fn == TrainerFn.FITTING:
            trainer.should_stop = True
            message += " The run ends here, because Watchmen were given action: stop."
        rank_zero_warn(message)

    def state_dict(self) -> dict[str, Any]:
        return {"first": self._first, "recent": self._recent, "warned": self._warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._first = dict(state_dict["first"])
        self._recent = {name: list(recent) for name, recent in state_dict["recent"].items()}
        self._warned = list(state_dict["warned"])
