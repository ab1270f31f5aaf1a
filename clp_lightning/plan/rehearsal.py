"""One training step on the meta device: the library's own code, without a number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..functional.kl import vocabulary_kl
from ..functional.logprobs import masked_sum
from ..functional.loss import policy_gradient_loss
from ..modules import CLPModule
from ..policy.cache import grow_in_place, make_full
from ..policy.prefix import extend, read_prompt
from ..policy.rollout import TransformersEngine
from ..policy.sampling import sample_tokens
from ..policy.stem import Stem, worth_keeping
from ..pretrained import load_skeleton
from ..rewards.heads import Head
from ..types import Preference, Rollout
from .devices import SHARDED
from .ledger import Ledger, fused_attention

__all__ = ["PARTS", "Load", "rehearse"]

PARTS = (
    "base",
    "deltas",
    "gradients",
    "optimizer",
    "merged copy",
    "activations",
    "KV cache",
    "rewards",
)


@dataclass
class Load:
    """How much one device computes at once.

    Attributes:
        prompts: Prompts in a training batch.
        prompt_tokens: Length of a prompt.
        accumulate: Training batches per optimizer step.
        one_preference: Whether the batch has one preference.
        dtype: Of the frozen base, if not the one that it is loaded in (``precision: bf16-true``).
        foreach: Whether the optimizer updates all parameters at once, as it does on a GPU.
        shard_group: How many devices share one copy of the weights, mixed layer by layer.
    """

    prompts: int
    prompt_tokens: int
    accumulate: int = 1
    one_preference: bool = False
    dtype: torch.dtype | None = None
    foreach: bool = False
    shard_group: int = 1


def rehearse(
    module: CLPModule, load: Load, model: PreTrainedModel | None = None
) -> dict[str, dict[str, int]]:
    """Bytes by part at the peak of each phase of a step, on one device that holds everything.

    The phases: ``sampling`` the responses, ``gradient`` (scores, reference, backward), ``update``
    by the optimizer, and the ``front`` of a validation. Responses are as long as they may be.

    Args:
        module: Not built yet; used up.
        load: How much is computed at once.
        model: The base on the meta device; made from ``module``'s description if None.
    """
    return _Rehearsal(module, load, model).run()


class _Rehearsal:
    def __init__(self, module: CLPModule, load: Load, model: PreTrainedModel | None) -> None:
        self.module, self.load, self.policy = module, load, module.policy
        skeleton = load_skeleton(self.policy.pretrained) if model is None else model
        names = module.rewards.names
        self.policy.attach(skeleton, names, module.seed)
        self.policy.cut_by_length = False  # responses are as long as they may be
        if load.shard_group > 1:
            self.policy.conditioner.move_in()
            self.policy.share_prompts = self.policy.share_stem = False
        if module.critic is not None:
            output: Any = self.policy.model.get_output_embeddings()
            module.critic.build(output.in_features, len(names), module.seed)
        module.to("meta")
        if load.dtype is not None:
            module.to(load.dtype)
        self.ledger = Ledger(dict.fromkeys(SHARDED, load.shard_group))

    def run(self) -> dict[str, dict[str, int]]:
        module, load = self.module, self.load
        optimizer = module.optimizer([{"params": module.own_parameters(), "lr": 1.0}])
        for group in optimizer.param_groups:
            if "foreach" in group:
                group["foreach"] = load.foreach
        self._take_stock()
        batch = -(-load.prompts * module.rollout_batches // module.rollout_chunks)
        rows = max(1, module.eval_rows // module.eval_samples)
        with self.ledger, fused_attention():
            self._first_update(optimizer)
            peak = self.ledger.peak_of
            front = peak(lambda: self._sample(rows, module.eval_samples, False))
            phases = {
                # Lightning clears the gradients of a step just before the next backward.
                "sampling": peak(lambda: self._sample(batch, module.samples_per_prompt, True)),
                "gradient": peak(lambda: self._gradient(optimizer, batch)),
                "update": peak(optimizer.step),
            }
        rewards = _reward_models(module)
        every = {**phases, "front": front}
        return {
            phase: {part: found.get(part, 0) for part in PARTS} | {"rewards": rewards}
            for phase, found in every.items()
        }

    def _take_stock(self) -> None:
        """Weights, and where gradients go."""
        trained = {id(p) for p in self.module.own_parameters()}
        for tensor in [*self.module.parameters(), *self.policy.buffers()]:
            self.ledger.assign(tensor, "deltas" if id(tensor) in trained else "base")
        for parameter in self.module.own_parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda p: self.ledger.assign(_gradient_of(p), "gradients")
            )

    def _first_update(self, optimizer: torch.optim.Optimizer) -> None:
        """A step behind which the optimizer's state and gradients are what they stay."""
        for parameter in self.module.own_parameters():
            parameter.grad = torch.zeros_like(parameter)
            self.ledger.assign(parameter.grad, "gradients")
        optimizer.step()
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor) and value.is_meta:
                    self.ledger.assign(value, "optimizer")

    def _preference(self, rows: int, alike: bool) -> Preference:
        count = len(self.module.rewards.names)
        weights = torch.full((rows, count), 1 / count)
        # Real numbers: what is alike is merged.
        alpha = torch.full((rows,), 0.5) if alike else torch.linspace(0.25, 0.75, rows)
        return Preference(weights, alpha)

    def _stem_states(self, prompts: int, samples: int, training: bool) -> Tensor | None:
        """What is kept, from sampling to scoring, of the blocks that no preference changes."""
        module, policy, load = self.module, self.policy, self.load
        engine = module.engine
        kept = isinstance(engine, TransformersEngine) and engine.records_stem
        kept &= policy.share_stem and not policy.gradient_checkpointing
        if not kept or Stem.told(policy.model, policy.conditioner) is None:
            return None
        width = policy.model.config.get_text_config().hidden_size
        each = load.prompt_tokens + samples * module.sampling.max_new_tokens
        if not worth_keeping(prompts * each, width):
            return None
        rollouts = load.prompts * module.rollout_batches if training else prompts
        dtype = load.dtype or policy.model.dtype
        return torch.empty(rollouts * each, width, dtype=dtype, device="meta")

    # -- phases -----------------------------------------------------------------------------

    @torch.no_grad()
    def _sample(self, prompts: int, samples: int, training: bool) -> None:
        """The last token of the longest responses; before it less is alive."""
        module, policy, length = self.module, self.policy, self.load.prompt_tokens
        alike = policy.conditioner.why_not_rows() is not None
        alike = alike or (training and self.load.one_preference)
        states = self._stem_states(prompts, samples, training)
        ids = torch.zeros(prompts, length, dtype=torch.long, device="meta")
        rows = torch.arange(prompts).repeat_interleave(samples)
        preference = self._preference(prompts, alike)
        with policy.eval_mode(), policy.conditioned(preference):
            with self.ledger.part("merged copy"), policy.rows(torch.arange(prompts)):
                pass
            mask = torch.ones_like(ids, dtype=torch.bool)
            with policy.rows(torch.arange(prompts)):
                prefix = read_prompt(policy.model, ids, mask).select(rows)
            grow_in_place(prefix.cache)
            before_last = module.sampling.max_new_tokens - 1
            with self.ledger.part("KV cache"):
                make_full(prefix.cache, before_last)
            if prefix.encoded is None:
                more = prefix.mask.new_ones(len(rows), before_last)
                prefix.mask = torch.cat([prefix.mask, more], -1)
            with policy.rows(rows):
                uniform = torch.zeros(len(rows), device="meta", dtype=torch.float64)
                token, _ = sample_tokens(prefix.logits, uniform, module.sampling)
                extend(policy.model, prefix, token.unsqueeze(-1))
        del states

    def _gradient(self, optimizer: torch.optim.Optimizer, batch: int) -> None:
        module, policy = self.module, self.policy
        states = self._stem_states(batch, module.samples_per_prompt, True)
        rollout = self._rollout()
        every_token = module.kl == "vocabulary"
        ask: Callable[[Rollout], Tensor]
        ask = policy.log_distributions if every_token else policy.logprobs
        with policy.conditioned(rollout.preference):
            with self.ledger.part("merged copy"), policy.rows(torch.arange(len(rollout))):
                pass
            own = ask(rollout)
        with policy.reference():
            ref = ask(rollout)
        logp = (
            own.gather(-1, rollout.response_ids.unsqueeze(-1)).squeeze(-1) if every_token else own
        )
        mask = rollout.response_mask
        loss = policy_gradient_loss(logp, logp.detach(), mask, num_responses=len(rollout))
        if every_token:
            loss = loss + masked_sum(vocabulary_kl(own, ref), mask).sum()
        del own, ref, logp
        if self.load.accumulate == 1:
            optimizer.zero_grad()
        loss.backward()
        del states

    def _rollout(self) -> Rollout:
        load, module = self.load, self.module
        groups = torch.arange(load.prompts).repeat_interleave(module.samples_per_prompt)
        rows, new = len(groups), module.sampling.max_new_tokens
        one = load.one_preference or self.policy.conditioner.why_not_rows() is not None
        ids = torch.zeros(rows, load.prompt_tokens, dtype=torch.long, device="meta")
        response = torch.zeros(rows, new, dtype=torch.long, device="meta")
        return Rollout(
            prompts=[""] * rows,
            prompt_ids=groups,
            groups=groups,
            sample=torch.zeros_like(groups),
            preference=self._preference(load.prompts, one)[groups],
            input_ids=ids,
            prompt_mask=torch.ones_like(ids, dtype=torch.bool),
            response_ids=response,
            response_mask=torch.ones_like(response, dtype=torch.bool),
            completions=[""] * rows,
            truncated=torch.zeros(rows, dtype=torch.bool),
        )


def _gradient_of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _reward_models(module: CLPModule) -> int:
    """Bytes of the reward models that stand on the policy's device."""
    heads = [reward for reward in module.rewards.rewards.values() if isinstance(reward, Head)]
    models = [
        load_skeleton(head.pretrained, head.auto_class) for head in heads if head.follows_policy
    ]
    return sum(p.numel() * p.element_size() for model in models for p in model.parameters())
