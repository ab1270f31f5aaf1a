"""Sampling responses: the engine interface, and the engine on Transformers' own forward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..described import Described, check_choice
from ..keyed import uniforms
from ..types import Preference, PromptBatch, Rollout
from .casting import in_half_precision
from .policy import Policy
from .sampling import Sampling, sample_tokens
from .stem import Recording
from .steps import CompiledSteps, Steps, compile_forward, warn_once
from .voices import Voices, mixes_rows

__all__ = ["Engine", "TransformersEngine"]

_POSITION_TABLES = ("wpe", "embed_positions", "positions_embed", "position_embeddings")


class Engine(Described, ABC):
    """Samples responses of a policy under a preference."""

    #: False where it samples from something else than the policy, so that it cannot train it.
    on_policy: bool = True
    #: Of the numbers it computes with, where that is less than the policy's own.
    precision: str | None = None

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

    @torch.no_grad()
    def logprobs(self, policy: Policy, rollout: Rollout) -> Tensor:
        """Log-probabilities of given responses under what this engine samples from.

        Returns:
            Shape (B, T), without gradient, tempered and not truncated.
        """
        together = _answerable_together(policy, rollout.preference)
        if len(together) == 1:
            return self._score(policy, rollout)
        scored = [self._score(policy, rollout.select(rows)) for rows in together]
        logp = scored[0].new_zeros(rollout.response_ids.shape)
        for rows, part in zip(together, scored, strict=True):
            logp[rows] = part
        return logp

    def _score(self, policy: Policy, rollout: Rollout) -> Tensor:
        """The same of responses that one forward can answer for."""
        with policy.conditioned(rollout.preference):
            return policy.logprobs(rollout)

    def forwards(self, policy: Policy, num_rewards: int) -> int:
        """How many policies are run for every token of a response."""
        return 1


class TransformersEngine(Engine):
    """A sampling loop over the model's own forward and cache.

    Each prompt is computed once and its cache repeated over the n responses. Token t of response
    (prompt id, sample) depends on the policy and on its own uniform number only, not on the rest
    of the batch, the rank, or what was drawn before.

    Args:
        compile: Run the forward of every token but the first two as a program of torch.compile's.
            Compiling takes from seconds to minutes, at the first rollout, again for the reference
            and for a batch of another size; no preference compiles anew.
            For decoder-only models without sliding windows, on weights that are not sharded.
        precision: ``bf16`` samples with copies of the weights in bfloat16. The responses are then
            not quite the policy's: log-probabilities are those of the scoring pass, in the
            policy's own precision, and a rollout carries none of the sampler's. Not on weights
            that are sharded.

    Attributes:
        on_tokens: Called at every step with the rows that grew and their tokens, shape (R,) each;
            for showing responses as they come.
    """

    on_tokens: Callable[[Tensor, Tensor], None] | None = None
    # For subclasses that do not start as this class does.
    compile: bool = False
    precision: Literal["bf16"] | None = None
    _program: Any = None

    def __init__(self, compile: bool = False, precision: Literal["bf16"] | None = None) -> None:
        self.compile = compile
        self.precision = check_choice("precision", precision, [None, "bf16"])
        self._program = compile_forward() if compile else None

    def voices(self, policy: Policy, preference: Preference) -> tuple[Preference, Tensor | None]:
        """Who speaks for each preference: the policy under it, and nobody else.

        Subclasses let the policy speak under several preferences at once, see ``MOD``.

        Returns:
            P * v preferences, the v voices of a prompt side by side, and the exponent of each
            voice in the distribution that is sampled from, shape (P, v); None for one voice.
        """
        return preference, None

    def forwards(self, policy: Policy, num_rewards: int) -> int:
        anything = Preference.single([1 / num_rewards] * num_rewards, 0.5)
        voices, _ = self.voices(policy, anything.to(policy.model.device))
        return len(voices)

    def _score(self, policy: Policy, rollout: Rollout) -> Tensor:
        voices, share = self.voices(policy, rollout.preference)
        if share is None:
            return super()._score(policy, rollout)
        mixed = torch.zeros(())
        for i, exponent in enumerate(share.unbind(1)):
            with policy.conditioned(voices[i :: share.shape[1]]):
                logp = policy.log_distributions(rollout)  # (B, T, V)
            mixed = mixed.to(logp) + exponent.to(logp)[:, None, None] * logp
        ids = rollout.response_ids.unsqueeze(-1)
        return mixed.log_softmax(-1).gather(-1, ids).squeeze(-1)

    @property
    def records_stem(self) -> bool:
        """Whether it computes as scoring would, which may then take up what it made."""
        return self.on_policy and not (self.compile or self.precision)

    @torch.no_grad()
    def generate(self, policy: Policy, batch: PromptBatch, n: int, sampling: Sampling) -> Rollout:
        preference = batch.preference
        if preference is None:
            raise ValueError(
                "The batch has no preference; add CLPCallback to the Trainer's callbacks."
            )
        if not len(batch) or n < 1:
            raise ValueError(
                f"There is nothing to sample: {len(batch)} prompts, {n} responses to each."
            )
        self._check(policy)
        rewritten = policy.conditioner.rewrites and not policy.is_reference
        input_ids, prompt_mask = policy.encode(batch.prompts, preference if rewritten else None)
        _check_positions(policy.model, int(prompt_mask.sum(-1).max()), sampling.max_new_tokens)
        groups = torch.arange(len(batch)).repeat_interleave(n)
        sample = torch.arange(n).repeat(len(batch))
        prompt_ids = batch.prompt_ids[groups]
        uniform = uniforms(
            sampling.seed, batch.epoch, prompt_ids, sample, sampling.max_new_tokens
        ).to(input_ids.device)
        rows = groups.to(input_ids.device)
        shape = (len(rows), sampling.max_new_tokens)
        response_ids = torch.full(shape, policy.pad_id, device=rows.device)
        mask = torch.zeros(shape, dtype=torch.bool, device=rows.device)
        logp = torch.zeros(shape, dtype=torch.float64, device=rows.device)
        finished = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        # The reference's responses are not scored.
        records = self.records_stem and not policy.is_reference
        tokens = input_ids.numel() + response_ids.numel()
        record = Recording(policy.stem if records else None, len(rows), tokens)
        with policy.eval_mode(), record:
            for asked in _answerable_together(policy, preference):
                mine = torch.isin(rows, asked)
                local = torch.searchsorted(asked, rows[mine])
                voices, share = preference[asked], None
                if not policy.is_reference:  # it speaks with one voice
                    voices, share = self.voices(policy, voices)
                with policy.answering(voices):
                    ids, part, logps, finished[mine] = self._decode(
                        policy,
                        input_ids[asked],
                        prompt_mask[asked],
                        local,
                        uniform[mine],
                        sampling,
                        share,
                        mine.nonzero().squeeze(-1),
                        record,
                    )
                response_ids[mine, : ids.shape[1]] = ids
                mask[mine, : ids.shape[1]] = part
                logp[mine, : ids.shape[1]] = logps.double()
        length = int(mask.sum(-1).max())
        response_ids, mask = response_ids[:, :length], mask[:, :length]
        logp = logp[:, :length].to(torch.promote_types(logps.dtype, torch.float32))
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
            logp=None if self._scoring_tells(policy, sampling) else logp,
            reference_input_ids=None if plain is None else plain[0][rows],
            reference_prompt_mask=None if plain is None else plain[1][rows],
            stem=record.states,
        )

    def _scoring_tells(self, policy: Policy, sampling: Sampling) -> bool:
        """Whether log-probabilities are left to scoring, because decoding rounds otherwise."""
        whole = sampling.top_p == 1 and not sampling.top_k
        # Of another distribution scoring knows nothing.
        alike = whole and sampling.temperature == policy.temperature
        return self.precision is not None or (alike and in_half_precision(policy.model))

    def _steps(self, policy: Policy, sampling: Sampling) -> Steps:
        dtype = None if self.precision is None else torch.bfloat16
        if self._program is None:
            return Steps(sampling.max_new_tokens, dtype)
        return CompiledSteps(sampling.max_new_tokens, dtype, self._program)

    def _check(self, policy: Policy) -> None:
        """Refuses what this engine cannot decode with, before anything is computed."""
        name = type(self).__name__
        if policy.is_sharded and (self.compile or self.precision):
            raise ValueError(
                "Decoding with sharded weights can be neither compiled nor cast; use "
                f"{name} without compile and precision."
            )
        if policy.model.config.is_encoder_decoder and self.compile:
            raise ValueError(
                "Decoding with an encoder-decoder model cannot be compiled; use "
                f"{name}(compile=False)."
            )

    def _decode(
        self,
        policy: Policy,
        input_ids: Tensor,
        prompt_mask: Tensor,
        rows: Tensor,
        uniform: Tensor,
        sampling: Sampling,
        share: Tensor | None,
        number: Tensor,
        record: Recording,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens, mask and log-probabilities, shape (B, T), and which rows met a stop token.

        ``number`` says which responses of the rollout these are, shape (B,).
        """
        stop = torch.tensor(policy.stop_ids, device=rows.device, dtype=torch.long)
        steps = self._steps(policy, sampling)  # with copies of weights for these preferences only
        voices = Voices(policy, input_ids, prompt_mask, rows, share, steps)
        record.begins(input_ids, prompt_mask, rows, sampling.max_new_tokens)
        shape = (len(rows), sampling.max_new_tokens)
        tokens = torch.full(shape, policy.pad_id, device=rows.device)
        mask = torch.zeros(shape, dtype=torch.bool, device=rows.device)
        wide = torch.promote_types(voices.logits().dtype, torch.float32)
        logps = torch.zeros(shape, dtype=wide, device=rows.device)
        finished = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        running = torch.arange(len(rows), device=rows.device)  # responses the model still computes
        with voices:
            for step in range(sampling.max_new_tokens):
                token, logp = sample_tokens(voices.logits(), uniform[running, step], sampling)
                # The first stop token ends the response and belongs to it; nothing else does.
                open_ = ~finished[running]
                mask[running, step] = open_
                tokens[running, step] = token.where(open_, tokens[running, step])
                logps[running, step] = logp.where(open_, 0.0)
                if self.on_tokens is not None:
                    self.on_tokens(number[running][open_], token[open_])
                finished[running] |= torch.isin(token, stop)
                ended = finished[running]
                if step + 1 == sampling.max_new_tokens or not policy.most(int((~ended).sum())):
                    break
                if ended.all():  # others that share the weights go on
                    ended = torch.arange(len(running), device=running.device) > 0
                kept = steps.kept(ended)
                if kept is not None:
                    voices.select(kept)
                    running, token = running[kept], token[kept]
                voices.extend(token)
                record.extends(running, step)
        record.ended(number, tokens, mask.sum(-1))
        length = step + 1
        return tokens[:, :length], mask[:, :length], logps[:, :length], finished


def _answerable_together(policy: Policy, preference: Preference) -> list[Tensor]:
    """Rows of the preference that one forward can answer for.

    All of them, or one preference at a time where the conditioner cannot mix rows.
    """
    device = policy.model.device
    if mixes_rows(policy):
        return [torch.arange(len(preference), device=device)]
    groups = [torch.arange(0, device=device)]
    if len(preference):
        both = torch.cat([preference.weights, preference.alpha.unsqueeze(-1)], -1)
        which = both.unique(dim=0, return_inverse=True)[1].to(device)
        groups = [(which == i).nonzero().squeeze(-1) for i in range(int(which.max()) + 1)]
    # Equally many wherever the weights are shared: what comes twice is the same twice.
    return groups + groups[:1] * (policy.most(len(groups)) - len(groups))


def _check_positions(model: PreTrainedModel, prompt: int, new: int) -> None:
    """Refuses prompts and responses that are longer than the model's table of positions.

    Rotary positions have no table: there it is a warning.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    # The last token of a response is never read; an encoder has positions of its own.
    needed = max(prompt, new) if model.config.is_encoder_decoder else prompt + new - 1
    if limit is None or needed <= limit:
        return
    modules = {name.rpartition(".")[2]: module for name, module in model.named_modules()}
    advice = "lower max_prompt_tokens or max_new_tokens"
    if any(isinstance(modules.get(name), nn.Embedding) for name in _POSITION_TABLES):
        raise ValueError(
            f"A prompt of {prompt} tokens and max_new_tokens={new} need {needed} positions; the "
            f"model has {limit}: {advice}."
        )
    if "rotary_emb" in modules:
        warn_once(
            f"Prompts and responses are longer than the {limit} positions that this model was "
            f"made for (max_position_embeddings), where it may well be useless: {advice}."
        )


def _texts(policy: Policy, response_ids: Tensor, mask: Tensor) -> list[str]:
    lengths = mask.sum(-1).tolist()
    kept = [row[:length] for row, length in zip(response_ids.tolist(), lengths, strict=True)]
    return policy.tokenizer.batch_decode(kept, skip_special_tokens=True)
