"""Sampling responses: the engine interface, and the engine on Transformers' own forward."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..described import Described
from ..keyed import uniforms
from ..types import PromptBatch, Rollout
from .policy import Policy
from .prefix import extend, read_prompt
from .sampling import Sampling, sample_tokens

__all__ = ["Engine", "TransformersEngine"]


class Engine(Described, ABC):
    """Samples responses of a policy under a preference."""

    @abstractmethod
    def generate(self, policy: Policy, batch: PromptBatch, n: int, sampling: Sampling) -> Rollout:
        """n responses for every prompt of ``batch``, each under its row of the preference.

        Args:
            policy: The policy; answers for ``batch.preference``, or as the reference where the
                caller opened ``policy.reference()``.
            batch: P prompts with P preferences.
            n: Responses per prompt.
            sampling: Limit, temperature, truncation and seed.

        Returns:
            B = P * n rows; the responses of a prompt stand side by side.
        """


class TransformersEngine(Engine):
    """A sampling loop over the model's own forward and cache.

    Each prompt is computed once and its cache repeated over the n responses. Token t of response
    (prompt id, sample) depends on the policy and on its own uniform number only, not on the rest
    of the batch, the rank, or what was drawn before.
    """

    @torch.no_grad()
    def generate(self, policy: Policy, batch: PromptBatch, n: int, sampling: Sampling) -> Rollout:
        preference = batch.preference
        if preference is None:
            raise RuntimeError("The batch has no preference; add CLPCallback to the Trainer.")
        rewritten = policy.conditioner.rewrites and not policy.is_reference
        input_ids, prompt_mask = policy.encode(batch.prompts, preference if rewritten else None)
        groups = torch.arange(len(batch)).repeat_interleave(n)
        sample = torch.arange(n).repeat(len(batch))
        prompt_ids = batch.prompt_ids[groups]
        uniform = uniforms(
            sampling.seed, batch.epoch, prompt_ids, sample, sampling.max_new_tokens
        ).to(input_ids.device)
        rows = groups.to(input_ids.device)
        with policy.answering(preference), policy.eval_mode():
            response_ids, mask, logp, finished = self._decode(
                policy, input_ids, prompt_mask, rows, uniform, sampling
            )
        plain = policy.encode(batch.prompts) if rewritten else None
        return Rollout(
            prompts=[batch.prompts[g] for g in groups.tolist()],
            prompt_ids=prompt_ids,
            groups=rows,
            sample=sample,
            preference=preference[rows],
            input_ids=input_ids[rows],
            prompt_mask=prompt_mask[rows],
            response_ids=response_ids,
            response_mask=mask,
            completions=_texts(policy, response_ids, mask),
            truncated=~finished if policy.stop_ids else torch.zeros_like(finished),
            columns={
                name: [column[g] for g in groups.tolist()] for name, column in batch.columns.items()
            },
            logp=logp,
            reference_input_ids=None if plain is None else plain[0][rows],
            reference_prompt_mask=None if plain is None else plain[1][rows],
        )

    def _decode(
        self,
        policy: Policy,
        input_ids: Tensor,
        prompt_mask: Tensor,
        rows: Tensor,
        uniform: Tensor,
        sampling: Sampling,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens, mask and log-probabilities, shape (B, T), and which rows met a stop token."""
        stop = torch.tensor(policy.stop_ids, device=rows.device, dtype=torch.long)
        with policy.rows(torch.arange(len(input_ids), device=rows.device)):
            prefix = read_prompt(policy.model, input_ids, prompt_mask).select(rows)
        finished = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        tokens, masks, logps = [], [], []
        with policy.rows(rows):
            for step in range(sampling.max_new_tokens):
                token, logp = sample_tokens(prefix.logits, uniform[:, step], sampling)
                masks.append(~finished)
                tokens.append(token.masked_fill(finished, policy.pad_id))
                logps.append(logp.masked_fill(finished, 0))
                # The first stop token ends the response and belongs to it; nothing else does.
                finished = finished | torch.isin(token, stop)
                if finished.all() or step + 1 == sampling.max_new_tokens:
                    break
                extend(policy.model, prefix, tokens[-1].unsqueeze(-1))
        return torch.stack(tokens, 1), torch.stack(masks, 1), torch.stack(logps, 1), finished


def _texts(policy: Policy, response_ids: Tensor, mask: Tensor) -> list[str]:
    kept = [ids[m].tolist() for ids, m in zip(response_ids.cpu(), mask.cpu(), strict=True)]
    return policy.tokenizer.batch_decode(kept, skip_special_tokens=True)
