"""From rewards and log-probabilities to the loss (docs/method.md, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from ..functional.advantage import leave_one_out
from ..functional.kl import kl_to_go, log_ratio, vocabulary_kl
from ..functional.logprobs import masked_sum
from ..functional.loss import policy_gradient_loss
from ..functional.objective import scalarize
from ..types import Rollout
from .critic import Critic
from .tally import Tally

if TYPE_CHECKING:
    from ..policy import Policy
    from ..rewards import RewardBank, Scores

__all__ = ["KLForm", "LearningSignal"]

KLForm = Literal["response", "to_go", "vocabulary"]


class LearningSignal(LightningModule):
    """The arithmetic of ``CLPModule``'s training step, one overridable method a step."""

    policy: Policy
    rewards: RewardBank
    tally: Tally
    kl: KLForm
    critic: Critic | None
    truncation_penalty: float
    own_parameters: Callable[[], list[nn.Parameter]]

    def measure(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Log-probability of every token, and its KL to the reference in nats, shape (B, T) each.

        The KL carries a gradient only if ``kl="vocabulary"``; a log-ratio has none to give.
        """
        every_token = self.kl == "vocabulary"
        ask = self.policy.log_distributions if every_token else self.policy.logprobs
        with self.policy.conditioned(rollout.preference):
            own = ask(rollout)
        with self.policy.reference():
            ref = ask(rollout)
        if not every_token:
            return own, log_ratio(own.detach(), ref)
        logp = own.gather(-1, rollout.response_ids.unsqueeze(-1)).squeeze(-1)
        return logp, vocabulary_kl(own, ref)

    def signals(self, scores: Scores, ratio: Tensor, rollout: Rollout) -> Tensor:
        """What each token is held to account for, shape (B, T, K + 1).

        The normalised rewards of its response; NaN where a reward did not score. And the KL: of
        the whole response, from the token on, or, where a token's own KL has a gradient, from the
        next one on.
        """
        rewards = self.rewards.normalize(scores.raw).to(ratio)  # (B, K)
        if self.truncation_penalty:
            rewards = rewards - self.truncation_penalty * rollout.truncated.to(ratio)[:, None]
        per_token = rewards.unsqueeze(1).expand(-1, ratio.shape[1], -1)
        kl = kl_to_go(ratio, rollout.response_mask)  # (B, T)
        if self.kl == "response":
            kl = kl[:, :1].expand_as(kl)
        elif self.kl == "vocabulary":
            kl = kl - ratio.masked_fill(~rollout.response_mask, 0)
        return torch.cat([per_token, kl.unsqueeze(-1)], dim=-1)

    def predict(self, rollout: Rollout) -> Rollout:
        """The rollout with what the critic expects of its signals; without a critic, as it is."""
        if self.critic is None or not (len(rollout) or self.policy.is_sharded):
            return rollout
        states = self.policy.prompt_states(rollout)
        return replace(rollout, predicted=self.critic(states, rollout.preference))

    def advantage(self, signals: Tensor, rollout: Rollout) -> Tensor:
        """Each signal less its baseline, then weighted by w and alpha, shape (B, T).

        The baseline is the mean of the siblings, or what the critic expects.
        """
        if rollout.predicted is None:
            centred = leave_one_out(signals, groups=rollout.groups)
        else:
            centred = signals - rollout.predicted.detach().unsqueeze(1)
            centred = centred.masked_fill(signals.isnan(), 0)
        return scalarize(centred, preference=rollout.preference)

    def loss(
        self, logp: Tensor, advantage: Tensor, rollout: Rollout, *, num_responses: float
    ) -> Tensor:
        """Its gradient is minus an unbiased estimate of V's."""
        if not len(rollout):  # every sample was dropped; the graph must stay whole
            if self.policy.is_sharded:
                return logp.sum()  # by way of the blocks, which gather themselves
            return torch.stack([p.sum() for p in self.own_parameters()]).sum() * 0
        return policy_gradient_loss(
            logp, advantage, rollout.response_mask, num_responses=num_responses
        )

    def further_losses(
        self, kl: Tensor, signals: Tensor, rollout: Rollout, *, num_responses: float
    ) -> Tensor:
        """The KL's own gradient where it has one, and the critic's regression; a scalar."""
        total = kl.new_zeros(())
        if self.kl == "vocabulary":
            alpha = rollout.preference.alpha.to(kl)
            total = total + (alpha * masked_sum(kl, rollout.response_mask)).sum() / num_responses
        if rollout.predicted is not None:
            error = Critic.loss(rollout.predicted, signals[:, 0], num_responses=num_responses)
            self.tally.add("critic_loss", error)
            total = total + error
        return total
