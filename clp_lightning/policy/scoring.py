"""What a model says of given responses, at response positions only."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from ..types import Preference, Rollout
from .lengths import Bundle, score_bundles
from .prefix import Rows, accepted, extend, first_of_group, positions, read_prompt, run_encoder
from .readout import Readout
from .stem import Given

__all__ = ["score_full", "score_shared", "stand_in", "worth_sharing"]

# Multiplications that sharing prompts must save, or the second pass costs more than it saves.
_WORTH_SHARING = 1e9


def worth_sharing(num_weights: int, input_ids: Tensor, groups: Tensor) -> bool:
    """Whether to run each prompt once for all responses of its group.

    Args:
        num_weights: Of the model.
        input_ids: Prompt tokens, shape (B, L).
        groups: Which responses share prompt and preference, shape (B,).
    """
    spared = len(groups) - int(groups.max()) - 1
    return spared * input_ids.shape[1] * num_weights >= _WORTH_SHARING


def stand_in(rollout: Rollout) -> Rollout:
    """One row of nothing, of the width of an empty ``rollout``, for a pass that must be made."""
    ids = rollout.input_ids.new_zeros(1, rollout.input_ids.shape[1])
    response_ids = rollout.response_ids.new_zeros(1, rollout.response_ids.shape[1])
    weights = rollout.preference.weights
    k = weights.shape[1]
    return replace(
        rollout,
        prompts=[""],
        prompt_ids=rollout.prompt_ids.new_zeros(1),
        groups=rollout.groups.new_zeros(1),
        preference=Preference(weights.new_full((1, k), 1 / max(k, 1)), weights.new_zeros(1)),
        input_ids=ids,
        prompt_mask=torch.ones_like(ids, dtype=torch.bool),
        response_ids=response_ids,
        response_mask=torch.ones_like(response_ids, dtype=torch.bool),
        reference_input_ids=None,
        reference_prompt_mask=None,
    )


def score_shared(
    model: PreTrainedModel,
    input_ids: Tensor,
    prompt_mask: Tensor,
    response_ids: Tensor,
    groups: Tensor,
    bundles: list[Bundle],
    rows: Rows,
    readout: Readout,
    given: Given,
) -> Tensor:
    """Every prompt once, its cache repeated over the responses of its group.

    Args:
        model: A causal or encoder-decoder model.
        input_ids: Prompt tokens, shape (B, L).
        prompt_mask: True where a token stands, shape (B, L).
        response_ids: Shape (B, T).
        groups: Which responses share prompt and preference, shape (B,).
        bundles: Responses that are run together.
        rows: Opens the preference of the rollout's rows at an index.
        readout: Reads off the logits what is wanted, for example log-probabilities.
        given: What of it need not be computed again.

    Returns:
        The readout of every position, shape (B, T, ...); those behind the end mean nothing.
    """
    first = first_of_group(groups)
    with rows(first), given.prompts(first, prompt_mask.shape[1]), readout.model_runs():
        prompts = read_prompt(model, input_ids[first], prompt_mask[first])

    def score(bundle: Bundle) -> Tensor:
        ids = response_ids[bundle.rows, : bundle.response]
        prefix = prompts.copy().select(groups[bundle.rows])
        with rows(bundle.rows):
            start = readout(prefix.logits.unsqueeze(1), ids[:, :1])
            if bundle.response == 1:
                return start
            with given.responses(bundle.rows, bundle.response - 1), readout.model_runs():
                logits = extend(model, prefix, ids[:, :-1])
            return torch.cat([start, readout(logits, ids[:, 1:])], dim=1)

    return score_bundles(bundles, response_ids.shape[1], score)


def score_full(
    model: PreTrainedModel,
    input_ids: Tensor,
    prompt_mask: Tensor,
    response_ids: Tensor,
    groups: Tensor,
    bundles: list[Bundle],
    rows: Rows,
    readout: Readout,
) -> Tensor:
    """The same without any cache: gradient checkpointing turns caches off in train mode.

    Causal models run prompt and response of every row in one piece; encoder-decoder models
    still run each prompt's encoder once.
    """
    if model.config.is_encoder_decoder:
        first = first_of_group(groups)
        with rows(first):
            encoded = run_encoder(model, input_ids[first], prompt_mask[first])

    def seq2seq(bundle: Bundle) -> Tensor:
        ids = response_ids[bundle.rows, : bundle.response]
        start = ids.new_full((len(ids), 1), model.config.decoder_start_token_id)
        with rows(bundle.rows):
            with readout.model_runs():
                out = model(
                    encoder_outputs=BaseModelOutput(last_hidden_state=encoded[groups[bundle.rows]]),
                    attention_mask=prompt_mask[bundle.rows],
                    decoder_input_ids=torch.cat([start, ids[:, :-1]], dim=1),
                    use_cache=False,
                )
            return readout(out.logits, ids)

    def causal(bundle: Bundle) -> Tensor:
        ids = response_ids[bundle.rows, : bundle.response]
        read = torch.cat([input_ids[bundle.rows, -bundle.prompt :], ids[:, :-1]], dim=1)
        seen = torch.ones_like(ids[:, :-1], dtype=torch.bool)
        mask = torch.cat([prompt_mask[bundle.rows, -bundle.prompt :], seen], dim=1)
        with rows(bundle.rows):
            with readout.model_runs():
                out = model(
                    input_ids=read,
                    attention_mask=mask,
                    use_cache=False,
                    **accepted(model, position_ids=positions(mask), logits_to_keep=bundle.response),
                )
            return readout(out.logits[:, -bundle.response :], ids)

    score = seq2seq if model.config.is_encoder_decoder else causal
    return score_bundles(bundles, response_ids.shape[1], score)
