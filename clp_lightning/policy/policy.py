"""The policy: a language model and its conditioner. The reference is the same network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import pretrained as pretrained_models
from ..conditioning import Conditioner
from ..conditioning.sharded import ADOPTED
from ..functional.logprobs import log_distribution, token_logprobs
from ..pretrained import Pretrained
from ..types import Preference, Prompt, Rollout
from .cache import is_recurrent
from .casting import attention_alike, in_half_precision
from .encoding import Encoding, pad
from .lengths import Bundle, bundles, whole
from .linear import speed_up_linears
from .prefix import first_of_group, groups_alike, read_prompt
from .readout import InPieces, OfLogits, Readout, can_be_cut
from .scoring import score_full, score_shared, stand_in, worth_sharing
from .sharded import shard_model
from .stem import Given, Stem

__all__ = ["Policy"]

# Logits of a scoring pass; from so many on they are computed a piece at a time, of so many.
_MANY_LOGITS, _PIECE = 20_000_000, 2**23


class Policy(nn.Module):
    """One network that answers for every (w, alpha); with all coefficients 0 it is the reference.

    The constructor takes a description, which costs nothing; ``build`` loads weights.

    Args:
        pretrained: The base: a hub name, a folder, an installed package, or a ``Pretrained``.
        conditioner: How a preference reaches the network.
        encoding: How prompts become tokens.
        temperature: Of policy and reference alike.
        gradient_checkpointing: Recompute activations in the backward pass.

    Attributes:
        share_prompts: Whether the responses of a prompt share it: computed once in scoring, stored
            once while decoding. Decided by sizes if None; the values are the same to rounding. No
            prompt is shared in scoring where it is recomputed, or where layers overwrite a state.
        share_stem: Whether what the blocks below all conditioned ones made of a rollout is kept.
        cut_by_length: Whether scoring runs responses of like length together, where lengths differ
            so much that it pays. The values are the same to rounding.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        pretrained: str | Pretrained,
        conditioner: Conditioner,
        encoding: Encoding | None = None,
        temperature: float = 1.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.pretrained = pretrained_models.as_pretrained(pretrained)
        self.conditioner = conditioner
        self.encoding = encoding or Encoding()
        self.temperature = temperature
        self.gradient_checkpointing = gradient_checkpointing
        self.share_prompts: bool | None = None
        self.share_stem = self.cut_by_length = True
        self._stem: tuple[Stem | None] | None = None  # asked once
        self._mesh: DeviceMesh | None = None
        self._can_be_cut: bool | None = None  # asked once
        self._answering_for: Preference | Literal["reference"] | None = None

    @property
    def is_built(self) -> bool:
        """Whether ``build`` has run."""
        return "model" in self._modules

    def build(self, names: Sequence[str], seed: int = 0) -> None:
        """Loads the base and attaches the conditioner; a second call does nothing.

        Args:
            names: Reward names, in the order of the preference's columns.
            seed: Key of the conditioner's initial weights.
        """
        if self.is_built:
            return
        self.tokenizer = pretrained_models.load_tokenizer(self.pretrained)
        self.attach(pretrained_models.load_model(self.pretrained), names, seed)
        self.stop_ids = pretrained_models.stop_ids(self.model, self.tokenizer)

    def attach(self, model: PreTrainedModel, names: Sequence[str], seed: int) -> None:
        """Makes ``model`` the base: conditioned, and ready to train.

        Args:
            model: With weights, or without them on the meta device.
            names: As in ``build``.
            seed: As in ``build``.
        """
        self.model = model
        self.conditioner.attach_once(model, names, seed)
        speed_up_linears(model)
        self._num_weights = model.num_parameters()  # to count takes longer than some passes
        self._is_recurrent = is_recurrent(model)
        if self.gradient_checkpointing:
            self.model.activation_checkpointing_enable(
                {"use_reentrant": False, "context_fn": self.conditioner.checkpoint_context}
            )
        self.train()

    def train(self, mode: bool = True) -> Self:
        """For checkpoints only: in train mode some routers are noisy, some decoders cacheless."""
        return super().train(mode and self.gradient_checkpointing)

    def shard(self, mesh: DeviceMesh) -> None:
        """Splits the weights over the devices of ``mesh`` (FSDP2); a second call does nothing.

        Each computes with whole blocks, which it gathers one by one; so all of them must call the
        model equally often.
        """
        if self.is_sharded:
            return
        shard_model(self.model, self.conditioner, mesh)
        # Alike everywhere, whatever the sizes of the batches.
        self.share_prompts, self.cut_by_length, self._mesh = False, False, mesh

    @property
    def stem(self) -> Stem | None:
        """The first blocks, which no preference changes; None where there are none, or unwanted."""
        # Where the policy recomputes in whole, the reference shall compute as it does.
        if not self.share_stem or self.is_sharded or self.gradient_checkpointing:
            return None
        self._stem = self._stem or (Stem.of(self.model, self.conditioner),)
        return self._stem[0]

    @property
    def is_sharded(self) -> bool:
        """Whether ``shard`` has run."""
        return self._mesh is not None

    def most(self, number: int) -> int:
        """The largest ``number`` of the devices that share one set of weights."""
        if self._mesh is None:
            return number
        most = torch.tensor(number, device=self.model.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, self._mesh.get_group())
        return int(most)

    def conditioned(self, preference: Preference) -> AbstractContextManager[None]:
        """Answer for ``preference``, one row per row of the batch, with the weights as they are."""
        return self._answer_for(preference)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Answer as the reference inside the block, and record no gradient."""
        with self._answer_for("reference"), torch.no_grad():
            yield

    @property
    def is_reference(self) -> bool:
        """Whether ``reference()`` is open."""
        return self._answering_for == "reference"

    def answering(self, preference: Preference) -> AbstractContextManager[None]:
        """``preference``, but the reference stays the reference where it is open."""
        return self._answer_for("reference" if self.is_reference else preference)

    @contextmanager
    def _answer_for(self, whom: Preference | Literal["reference"]) -> Iterator[None]:
        outer, self._answering_for = self._answering_for, whom
        try:
            with self.conditioner.session():
                yield
        finally:
            self._answering_for = outer

    def rows(self, index: Tensor) -> AbstractContextManager[None]:
        """Opens the conditioner for a batch whose row b is row ``index[b]`` of the preference.

        Raises:
            RuntimeError: outside ``conditioned`` and ``reference``.
        """
        if self._answering_for is None:
            raise RuntimeError(
                "The policy was asked outside a preference. Wrap the call in "
                "`with policy.conditioned(preference):` or `with policy.reference():`."
            )
        if self._answering_for == "reference":
            return self.conditioner.reference()
        return self.conditioner.rows(self._answering_for, index)

    def encode(
        self, prompts: Sequence[Prompt], preference: Preference | None = None
    ) -> tuple[Tensor, Tensor]:
        """Token ids and mask of ``prompts``, shape (P, L), on the model's device.

        Args:
            prompts: P prompts.
            preference: P rows that the conditioner may write into the prompts; None for the
                reference's prompts.
        """
        rewrite: Callable[[int, Prompt], Prompt] | None = None
        if preference is not None and self.conditioner.rewrites:
            asked = preference

            def rewrite(row: int, prompt: Prompt) -> Prompt:
                return self.conditioner.rewrite(prompt, asked[row : row + 1])

        seq2seq = self.model.config.is_encoder_decoder
        # Causal models need the prompt's end beside the response; an encoder has positions of
        # its own, which padding on the left would move.
        keep = "start" if seq2seq else "end"
        ids = self.encoding(prompts, self.tokenizer, keep, rewrite)
        tokens, mask = pad(ids, self.pad_id, side="right" if seq2seq else "left")
        return tokens.to(self.model.device), mask.to(self.model.device)

    @property
    def pad_id(self) -> int:
        """What stands where no token is; masks, never this id, say where that is."""
        return int(self.tokenizer.pad_token_id or 0)

    def logprobs(self, rollout: Rollout) -> Tensor:
        """Log-probabilities of the responses, shape (B, T), inside one of the scopes.

        With prompt-CLP the reference sees the plain prompt.
        """
        if not len(rollout) and not self.is_sharded:  # every response was dropped
            return torch.zeros(rollout.response_ids.shape, device=rollout.response_ids.device)
        return self._score(rollout, lambda z, ids: token_logprobs(z, ids, self.temperature))

    def log_distributions(self, rollout: Rollout) -> Tensor:
        """Log-probabilities of the whole vocabulary at every position, shape (B, T, V).

        Large: 4 bytes x B x T x V, several times over in training.
        """
        if not len(rollout) and not self.is_sharded:
            return torch.zeros(*rollout.response_ids.shape, 1, device=rollout.response_ids.device)
        # In one piece: to put (B, T, V) back in order would take as much memory again, twice.
        return self._score(rollout, lambda z, ids: log_distribution(z, self.temperature), cut=False)

    @torch.no_grad()
    def prompt_states(self, rollout: Rollout) -> Tensor:
        """What the reference's output layer reads at the end of each prompt, shape (B, d)."""
        if not len(rollout):
            return self.prompt_states(stand_in(rollout))[:0]
        seen: list[Tensor] = []
        output: nn.Module = self.model.get_output_embeddings()
        hook = output.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, -1]))
        try:
            with self.reference():
                ids, mask, groups = self._prompts_read(rollout)
                first = first_of_group(groups)
                with self.eval_mode(), self.rows(first):
                    read_prompt(self.model, ids[first], mask[first])
        finally:
            hook.remove()
        return seen[0][groups]

    def _prompts_read(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids and mask of the prompts that who answers now reads, and who shares them."""
        ids, mask, groups = rollout.input_ids, rollout.prompt_mask, rollout.groups
        if not self.is_reference:
            return ids, mask, groups
        if rollout.reference_input_ids is not None:
            assert rollout.reference_prompt_mask is not None
            ids, mask = rollout.reference_input_ids, rollout.reference_prompt_mask
        # The reference reads a prompt once, whatever the preferences; on meta there is no token.
        return ids, mask, groups if ids.is_meta else groups_alike(ids, mask)

    def _score(self, rollout: Rollout, of_logits: OfLogits, cut: bool = True) -> Tensor:
        if not len(rollout):  # the other devices gather the weights, forwards and backwards
            rollout = stand_in(rollout)
            with self.answering(rollout.preference):
                return self._score(rollout, of_logits)[:0]
        ids, mask, groups = self._prompts_read(rollout)
        given = Given(self.stem if rollout.stem else None, rollout, ids, mask)
        # Rounding shows in half precision: there the reference goes the policy's way.
        half, with_gradient = in_half_precision(self.model), torch.is_grad_enabled()
        in_whole = self.gradient_checkpointing and self.training and (half or with_gradient)
        if (share := self.share_prompts) is None:
            shared = rollout.groups if half else groups
            share = given.pays or worth_sharing(self._num_weights, ids, shared)
        share = share and not (in_whole or self._is_recurrent)
        score = partial(score_shared, given=given) if share else score_full
        parts = self._bundles(rollout, mask, share, cut and self.cut_by_length)
        readout = self._readout(rollout, of_logits)
        with self.eval_mode(unless=with_gradient), attention_alike(self.model, self.conditioner):
            return score(
                self.model, ids, mask, rollout.response_ids, groups, parts, self.rows, readout
            )

    def _bundles(self, rollout: Rollout, mask: Tensor, share: bool, cut: bool) -> list[Bundle]:
        masks = mask, rollout.response_mask
        if not cut:
            return [whole(rollout.groups, *masks)]
        asked = self._answering_for
        in_runs = isinstance(asked, Preference) and self.conditioner.needs_runs(asked)
        apart = share or self.model.config.is_encoder_decoder
        together = rollout.groups if in_runs else None
        return bundles(self._num_weights, *masks, prompts_apart=apart, together=together)

    def _readout(self, rollout: Rollout, of_logits: OfLogits) -> Readout:
        a_position = len(rollout) * self.model.config.get_text_config().vocab_size
        # On all devices of sharded weights where it is on one: to ask takes a forward.
        if not self.most(int(a_position * rollout.response_ids.shape[1] >= _MANY_LOGITS)):
            return Readout(of_logits)
        if self._can_be_cut is None:
            self._can_be_cut = self._ask_whether_cut(rollout)
        if not self._can_be_cut:
            return Readout(of_logits)
        head: nn.Module = self.model.get_output_embeddings()
        positions = max(1, _PIECE // a_position)
        return InPieces(of_logits, head, positions, self.conditioner.checkpoint_context)

    @torch.no_grad()
    def _ask_whether_cut(self, rollout: Rollout) -> bool:
        first = rollout.groups.new_zeros(1)
        # Not as the reference, which not every conditioner has; a session of its own forgets.
        with self.conditioner.session(), self.eval_mode(), self.rows(first):
            ids, mask = rollout.input_ids[first], rollout.prompt_mask[first]
            return can_be_cut(self.model, lambda: read_prompt(self.model, ids, mask).logits)

    @contextmanager
    def eval_mode(self, unless: bool = False) -> Iterator[None]:
        """The model in eval mode, where Transformers keeps its caches, inside the block."""
        switch = self.training and not unless
        if switch:
            self.model.eval()
        try:
            yield
        finally:
            if switch:
                self.model.train()

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """What training changes, by name: the copies, the shared part, a learned gate."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad and ADOPTED not in name
        }
