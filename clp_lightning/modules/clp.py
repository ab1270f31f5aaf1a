"""CLPModule: one policy trained for every preference, told as a story."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Self, get_args

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from ..conditioning import Conditioner
from ..described import check_bound, check_choice, check_finite, describe, import_path
from ..functional.advantage import has_siblings
from ..keyed import resolve_seed
from ..metrics import Grid
from ..policy import Encoding, Engine, Policy, Sampling, TransformersEngine
from ..pretrained import Pretrained
from ..rewards import Reward, RewardBank, RewardError, Scores
from ..rewards.asked import Asked
from ..rewards.base import Unavailable
from ..rewards.faults import OnError
from ..types import PromptBatch, Rollout
from .ahead import Sampled, check_sampling, sample
from .base import LRDecay, PolicyModule
from .cost import Cost
from .critic import Critic
from .precision import float32_by_default
from .sharding import shard
from .signal import KLForm, LearningSignal
from .statistics import check_sizes, fit_statistics
from .stop import DropLimit, ask_rewards, check_step
from .sweep import FrontSweep
from .tally import Tally, count_responses

__all__ = ["CLPModule"]

_COST_KEY = "clp_lightning_cost"


class CLPModule(LearningSignal, FrontSweep, PolicyModule):
    """Trains one language model to follow any weighting of K rewards and any KL strength.

    Each step samples responses under the preferences that ``CLPCallback`` attached, scores them,
    and takes one policy-gradient step on V (docs/method.md, section 3). Methods are the named steps
    of ``training_step``; a subclass overrides one of them alone.

    Args:
        pretrained: The base and reference: a hub name, a folder or an installed package.
        conditioner: How (w, alpha) reaches the network.
        rewards: K rewards by name: objects, functions of TRL's signature, or their import paths.
        samples_per_prompt: Responses that share a prompt and a preference; at least 2 without a
            critic, because the baseline of each is the mean of the others.
        max_new_tokens: Limit of a response, in tokens.
        temperature: Sampling temperature of policy and reference alike.
        rollout_batches: Training batches whose responses are sampled at once.
        rollout_chunks: Parts in which they are sampled instead. With 2 or more, rewards score one
            in the background while the next is sampled: the same responses, sampled in smaller
            batches. Pays where rewards wait, for a server or another process.
        max_prompt_tokens: Limit of a prompt, in tokens.
        on_long: What happens to a prompt over the limit.
        chat_template_kwargs: Passed to the model's chat template.
        kl: The KL in a token's return. ``response``: the log-ratio of its whole response, which
            cancels the rewards' noise as the policy nears the optimum. ``to_go``: of the tokens
            from it on. ``vocabulary``: over all tokens that could have come, which takes
            B x T x V numbers several times over. The same expectation in all three.
        critic: Baseline by a learned critic; leave-one-out if None.
        truncation_penalty: Taken off every normalised reward of a response that was cut at the
            limit, in training only.
        statistics_prompts: Prompts whose reference responses fix the rewards' mean and deviation
            at the start of ``fit``; 0 leaves the rewards as they are.
        statistics_samples: Responses to each of them.
        std_floor: Least deviation a reward is divided by, one for all or by name.
        on_reward_error: Stop at a reward that fails on a sample, or drop the sample and count it.
        reward_retries: How often a failing reward is asked again before that, after 1, 2, 4, ...
            and at most 60 seconds.
        reward_timeout: Seconds that a call of a reward may take; no limit if None.
        max_dropped: Share of the responses of ten steps that may be dropped before the run stops.
        lr: Learning rate of the copies.
        lr_shared: Learning rate of the shared part; ``lr`` if None.
        weight_decay: Weight decay of everything trained; a hidden second KL.
        warmup_steps: Optimizer steps over which the learning rate rises.
        lr_decay: How the learning rate falls to 0 at the end of the run.
        optimizer: Optimizer class and its further arguments.
        lr_scheduler: Scheduler class and its arguments, stepped once per optimizer step.
        max_kl: Stops the run when the mean KL of a step, in nats per response, is above it.
        grid: Preferences of the front, at the end of ``fit`` and in ``validate`` and ``test``.
        small_grid: Preferences of the front during ``fit``; the corners if None.
        eval_samples: Responses per prompt and preference of a front.
        eval_rows: Responses that are sampled at once for a front.
        reference_point: Of the hypervolume, one number per normalised reward; -1 each if None.
        gradient_checkpointing: Recompute activations in the backward pass.
        engine: What samples responses; Transformers' forward if None.
        seed: Key of all randomness; that of ``seed_everything`` if None.

    Attributes:
        step_report: The numbers of the newest optimizer step, over all its responses and ranks.
    """

    def __init__(
        self,
        pretrained: str | Pretrained,
        conditioner: Conditioner,
        rewards: dict[str, Reward | str],
        samples_per_prompt: int = 4,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        rollout_batches: int = 1,
        rollout_chunks: int = 1,
        max_prompt_tokens: int = 512,
        on_long: Literal["truncate", "error"] = "truncate",
        chat_template_kwargs: dict[str, Any] | None = None,
        kl: KLForm = "response",
        critic: Critic | None = None,
        truncation_penalty: float = 0.0,
        statistics_prompts: int = 256,
        statistics_samples: int = 4,
        std_floor: float | dict[str, float] = 1e-3,
        on_reward_error: OnError = "raise",
        reward_retries: int = 0,
        reward_timeout: float | None = None,
        max_dropped: float = 0.5,
        lr: float = 1e-4,
        lr_shared: float | None = None,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        lr_decay: LRDecay = "none",
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        max_kl: float | None = None,
        grid: Grid | None = None,
        small_grid: Grid | None = None,
        eval_samples: int = 1,
        eval_rows: int = 128,
        reference_point: list[float] | None = None,
        gradient_checkpointing: bool = False,
        engine: Engine | None = None,
        seed: int | None = None,
    ) -> None:
        self.seed, temperature = resolve_seed(seed), float(temperature)
        encoding = Encoding(max_prompt_tokens, on_long, chat_template_kwargs)
        policy = Policy(pretrained, conditioner, encoding, temperature, gradient_checkpointing)
        rules: dict[str, Any] = {"reward_retries": reward_retries, "reward_timeout": reward_timeout}
        bank = RewardBank(rewards, std_floor=std_floor, on_reward_error=on_reward_error, **rules)
        schedule = (warmup_steps, lr_decay, optimizer, lr_scheduler)
        super().__init__(policy, lr, lr_shared, weight_decay, *schedule)
        least = 2 if critic is None else 1
        if samples_per_prompt < least:
            raise ValueError(
                f"samples_per_prompt is {samples_per_prompt}; it must be at least {least}. The "
                "leave-one-out baseline of a response is the mean of its siblings; a single "
                "response needs a critic: critic=Critic()."
            )
        for name, number in [("batches", rollout_batches), ("chunks", rollout_chunks)]:
            if number < 1:
                raise ValueError(f"rollout_{name} must be at least 1; got {number}.")
        self.rewards = bank
        self.drop_limit = DropLimit(max_dropped)
        self.failure: RewardError | None = None  # of this rank, not yet told to the others
        self.kl = check_choice("kl", kl, get_args(KLForm))
        self.critic = critic
        self.samples_per_prompt = samples_per_prompt
        self.rollout_batches = rollout_batches
        self.rollout_chunks = rollout_chunks
        self.truncation_penalty = check_finite("truncation_penalty", truncation_penalty)
        check_sizes(statistics_prompts, statistics_samples)
        self.statistics_prompts = statistics_prompts
        self.statistics_samples = statistics_samples
        self.max_kl = check_bound("max_kl", max_kl)
        self.describe_sweep(grid, small_grid, eval_samples, eval_rows, reference_point)
        self.engine = engine or TransformersEngine()
        self.sampling = Sampling(max_new_tokens, temperature, seed=self.seed)
        self.sampling.check_on_policy()
        self.tally = Tally()
        self.step_report: dict[str, float] = {}
        self.cost = Cost()
        self.asked: list[Asked] = []  # about the newest rollout, ahead of `score`
        self._sampled: Sampled | None = None

    # -- building ---------------------------------------------------------------------------

    def setup(self, stage: str) -> None:  # before the model is loaded
        data: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "column_names"):
            self.rewards.check_columns(data.column_names)
        if stage == "fit":
            check_sampling(self)

    def configure_model(self) -> None:
        if self.critic is not None and self.critic.is_built and not self.policy.is_built:
            raise ValueError(
                "This Critic belongs to another module; make a new one for each module."
            )
        with float32_by_default():
            self.policy.build(self.rewards.names, self.seed)
            if self.critic is not None:
                output: Any = self.policy.model.get_output_embeddings()
                self.critic.build(output.in_features, len(self.rewards.names), self.seed)
        shard(self, *([] if self.critic is None else [self.critic]))

    def on_fit_start(self) -> None:
        self.tally, self._sampled, self.asked = Tally(), None, []  # nothing is left of an old run
        self.drop_limit = DropLimit(self.drop_limit.share)
        self.cost.start()
        fit_statistics(self, self.statistics_prompts, self.statistics_samples)

    def on_train_end(self) -> None:
        self.cost.stop()

    # -- the algorithm ----------------------------------------------------------------------

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        rollout = self.rollout(batch)
        self.cost.count(self.tally, rollout, len(self.rewards.names))
        rollout, scores = self.score(rollout)
        logp, kl = self.measure(rollout)  # (B, T) each
        signals = self.signals(scores, kl.detach(), rollout)  # (B, T, K + 1)
        rollout = self.predict(rollout)
        advantage = self.advantage(signals, rollout)  # (B, T)
        nominal = (batch.nominal_size or 1) * self.samples_per_prompt  # alike in all micro-batches
        loss = self.loss(logp, advantage, rollout, num_responses=nominal)
        loss = loss + self.further_losses(kl, signals, rollout, num_responses=nominal)
        self.tally.count("not_finite", float(not loss.isfinite()))
        self.tally.add("nominal", torch.tensor(nominal))
        self.tally.add("loss", loss)
        count_responses(self, rollout, scores.raw, kl.detach(), logp)
        return loss

    def rollout(self, batch: PromptBatch) -> Rollout:
        """Responses to this step's slice of the batch; sampled with the first slice."""
        if batch.part == 0 or self._sampled is None:
            self._sampled = None  # two at once would take twice the memory
            self._sampled = sample(self, batch)
        rollout, self.asked = self._sampled.slice(batch, self.samples_per_prompt)
        return rollout

    def generate(self, batch: PromptBatch) -> Rollout:
        """Samples ``samples_per_prompt`` responses to every prompt under its preference.

        With several ``rollout_chunks`` it is asked for some of a batch's prompts at a time.
        """
        before = self.policy.encoding.truncated
        rollout = self.engine.generate(self.policy, batch, self.samples_per_prompt, self.sampling)
        self.tally.count("truncated_prompts", self.policy.encoding.truncated - before)
        return rollout

    def score(self, rollout: Rollout) -> tuple[Rollout, Scores]:
        """The kept responses and their K rewards.

        Without a critic, a response whose siblings were all dropped has no baseline and goes too.
        """
        scores = ask_rewards(self, rollout)
        kept = scores.kept
        if self.critic is None:
            kept = kept & has_siblings(rollout.groups.to(kept.device), among=kept)
        self.tally.count("failed", float(self.failure is not None))
        self.tally.count("dropped", float((~kept).sum()))
        return (rollout, scores) if kept.all() else (rollout.select(kept), scores.select(kept))

    # -- one optimizer step -----------------------------------------------------------------

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Once per step, before clipping: rescale to the kept responses, rest the idle copies."""
        step = self.tally.reduce(self.sum_over_ranks)
        check_step(self, step)
        self.cost.add_step(step)
        kept = step.pop("kept")
        norm = self.scale_gradients(step.pop("nominal"), kept)
        if not kept:  # a zero gradient would still move weights, on Adam's momentum
            self.zero_grad(set_to_none=True)
        used = [step.pop(f"used/{i}") > 0 for i in range(len(self.rewards.names) + 1)]
        self.policy.conditioner.drop_idle_gradients(torch.tensor(used))
        self.step_report = step
        self._log_step(step, norm)

    def _log_step(self, step: dict[str, float], norm: float) -> None:
        """Every number when loggers write, and in short runs; else what the progress bar shows.

        Lightning's bookkeeping costs as much per number as a small layer of a network.
        """
        shown = {"value"} | {f"reward/{name}" for name in self.rewards.names}
        reported = {f"reported/{name}": value for name, value in self.rewards.metrics.items()}
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        written = self.global_step < 10 or (every and (self.global_step + 1) % every == 0)
        if written:
            step["grad_norm"] = norm
        for name, value in {**step, **reported}.items():
            if written or name in shown:
                self.log(f"train/{name}", value, prog_bar=name in shown)

    # -- state ------------------------------------------------------------------------------

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Self:
        """As Lightning's; ``rewards`` may be given anew, functions without an import path too."""
        if "rewards" in kwargs:
            kwargs["rewards"] = RewardBank(kwargs["rewards"]).rewards
        return super().load_from_checkpoint(*args, **kwargs)

    def described_arguments(self) -> dict[str, Any]:
        arguments = super().described_arguments()
        for name, reward in arguments["rewards"].items():
            if reward is None:
                arguments["rewards"][name] = {
                    "class_path": import_path(Unavailable),
                    "init_args": {"name": name},
                }
        return arguments

    def identity(self) -> dict[str, Any]:
        conditioner = self.policy.conditioner
        rule = conditioner.coefficients
        return {
            **super().identity(),
            "rewards": list(self.rewards.names),
            "reward_settings": self.rewards.settings(),
            "coefficients": f"{import_path(type(rule))}, shared: {rule.shared}",
            "scale": describe(getattr(conditioner, "scale", None)),
            "temperature": self.policy.temperature,
        }

    def kept_state(self) -> Iterator[str]:
        yield from super().kept_state()
        if self.critic is not None:
            yield from (f"critic.{name}" for name, _ in self.critic.named_parameters())
        yield from (f"rewards.{name}" for name, _ in self.rewards.named_buffers())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[_COST_KEY] = self.cost.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.cost.load_state_dict(checkpoint.get(_COST_KEY))

    def further_groups(self) -> list[dict[str, Any]]:
        if self.critic is None:
            return []
        parameters = list(self.critic.parameters())
        group = {"params": parameters, "lr": self.critic.lr, "weight_decay": 0.0, "name": "critic"}
        return [group]
