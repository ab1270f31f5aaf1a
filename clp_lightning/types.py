"""Preference, PromptBatch and Rollout: the words that everything else uses.

``B`` counts responses, ``P`` prompts, ``T`` response tokens, ``L`` prompt tokens, ``K`` rewards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Message = dict[str, Any]
Prompt = str | list[Message]
"""A prompt is a plain string, or a conversation: a list of messages."""
REWARD_ARGUMENTS = (
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
)
"""What every reward is called with, as in TRL, beside the columns of the data."""


@dataclass
class Preference:
    """What the user asks for, one row per prompt or response.

    Attributes:
        weights: Importance of each reward, shape (B, K); rows are non-negative and sum to 1.
        alpha: KL strength in [0, 1], shape (B,).
    """

    weights: Tensor
    alpha: Tensor

    def __post_init__(self) -> None:
        if self.weights.ndim != 2 or self.alpha.shape != self.weights.shape[:1]:
            raise ValueError(
                "A Preference holds weights of shape (B, K) and alpha of shape (B,); got "
                f"{tuple(self.weights.shape)} and {tuple(self.alpha.shape)}."
            )

    @classmethod
    def single(cls, weights: Sequence[float] | Tensor, alpha: float) -> Preference:
        """One preference, as a Preference of one row."""
        row = torch.as_tensor(weights, dtype=torch.float32)
        return cls(row.reshape(1, -1), row.new_tensor([alpha]))

    @classmethod
    def cat(cls, parts: Sequence[Preference]) -> Preference:
        """Rows of several preferences, one after the other."""
        return cls(torch.cat([p.weights for p in parts]), torch.cat([p.alpha for p in parts]))

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, rows: Tensor | slice) -> Preference:
        """The rows at ``rows`` (a 1-d index, a mask or a slice)."""
        return Preference(self.weights[rows], self.alpha[rows])

    @property
    def num_rewards(self) -> int:
        """K."""
        return self.weights.shape[1]

    def to_dicts(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """``{"weights": {name: w}, "alpha": a}`` for every row, without float32's digits.

        Example:
            >>> Preference.single([0.3, 0.7], alpha=0.1).to_dicts(["kind", "short"])
            [{'weights': {'kind': 0.3, 'short': 0.7}, 'alpha': 0.1}]
        """
        return [
            {
                "weights": {n: round(w, 6) for n, w in zip(names, weights, strict=True)},
                "alpha": round(alpha, 6),
            }
            for weights, alpha in zip(self.weights.tolist(), self.alpha.tolist(), strict=True)
        ]

    def repeat_interleave(self, times: int) -> Preference:
        """Every row ``times`` times, copies side by side."""
        return Preference(
            self.weights.repeat_interleave(times, 0), self.alpha.repeat_interleave(times, 0)
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Preference:
        """The same preference on ``device``."""
        return Preference(
            self.weights.to(device, non_blocking=non_blocking),
            self.alpha.to(device, non_blocking=non_blocking),
        )


@dataclass
class PromptBatch:
    """Prompts that are not yet tokenised, with what travels beside them.

    Attributes:
        prompts: P strings or message lists.
        prompt_ids: The row's number before splitting, int64, shape (P,). Keys all randomness.
        columns: Every other column of the data, lists of length P.
        epoch: The sampler's own count of passes over the data.
        part: Which slice of a generation batch this step trains (``rollout_batches``).
        parts: Number of slices; the batch holds the prompts of all of them.
        nominal_size: Prompts in a full slice; the constant that the loss divides by.
        preference: P rows, attached by ``CLPCallback``.
    """

    prompts: list[Prompt]
    prompt_ids: Tensor
    columns: dict[str, list[Any]] = field(default_factory=dict)
    epoch: int = 0
    part: int = 0
    parts: int = 1
    nominal_size: int | None = None
    preference: Preference | None = None

    def __post_init__(self) -> None:
        lengths = {"prompt_ids": len(self.prompt_ids)}
        lengths |= {f"columns['{name}']": len(col) for name, col in self.columns.items()}
        for name, length in lengths.items():
            if length != len(self.prompts):
                raise ValueError(f"{name} has {length} entries for {len(self.prompts)} prompts.")

    @classmethod
    def check(cls, batch: Any) -> PromptBatch:
        """``batch`` itself.

        Raises:
            TypeError: it is no PromptBatch; says how to make one.
        """
        if not isinstance(batch, cls):
            raise TypeError(
                f"The data loader gave a {type(batch).__name__}, not a PromptBatch. Use "
                "PromptDataModule (source=datasets.Dataset.from_list(rows)), or a DataLoader whose "
                "collate_fn returns clp_lightning.data.collate(rows, prompt_ids, "
                "PromptFormat(columns))."
            )
        return batch

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, rows: Sequence[int]) -> PromptBatch:
        """The prompts at ``rows``, which may repeat."""
        index = torch.as_tensor(rows, dtype=torch.long)
        return replace(
            self,
            prompts=[self.prompts[i] for i in rows],
            prompt_ids=self.prompt_ids[index.to(self.prompt_ids.device)],
            columns={name: [col[i] for i in rows] for name, col in self.columns.items()},
            preference=None if self.preference is None else self.preference[index],
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PromptBatch:
        """Moves the preference; ids and text stay on the host, where they are used."""
        if self.preference is None:
            return self
        return replace(self, preference=self.preference.to(device, non_blocking))


class StemStates(NamedTuple):
    """What the blocks of a policy that no preference changes made of one response.

    Attributes:
        key: Of those blocks; to nobody else are the states of use.
        prompt_ids: Tokens of the prompt, shape (l,).
        prompt: States of them, shape (l, d).
        response_ids: Tokens of the response, shape (t,).
        response: States of all but the last, which is never read, shape (t - 1, d).
    """

    key: object
    prompt_ids: Tensor
    prompt: Tensor
    response_ids: Tensor
    response: Tensor


@dataclass
class Rollout:
    """Sampled responses; row b is one response.

    Attributes:
        prompts: B prompts as the data gave them (the reference's prompt).
        prompt_ids: int64, shape (B,).
        groups: Which responses share (prompt, preference): 0 .. G-1, shape (B,).
        sample: Number of the response within its group, shape (B,).
        preference: B rows.
        input_ids: Prompt tokens, shape (B, L), left-padded; for encoder-decoder models the
            encoder's input, right-padded.
        prompt_mask: True where ``input_ids`` holds a token, shape (B, L).
        response_ids: Sampled tokens, right-padded, shape (B, T).
        response_mask: True up to and including the stop token, shape (B, T).
        completions: B texts, special tokens skipped.
        truncated: True where the response was cut at the limit, shape (B,).
        columns: Every other column of the data, lists of length B.
        logp: The sampler's own log-probabilities, shape (B, T); None where they are left to
            scoring, because in half precision it rounds otherwise (of the policy's own
            distribution only).
        reference_input_ids: The plain prompt where the policy's was rewritten (prompt-CLP).
        reference_prompt_mask: Its mask.
        predicted: What a critic expects of the K rewards and the KL, shape (B, K + 1), or None.
        stem: What need not be computed again, of every response, or None.
    """

    prompts: list[Prompt]
    prompt_ids: Tensor
    groups: Tensor
    sample: Tensor
    preference: Preference
    input_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    completions: list[str]
    truncated: Tensor
    columns: dict[str, list[Any]] = field(default_factory=dict)
    logp: Tensor | None = None
    reference_input_ids: Tensor | None = None
    reference_prompt_mask: Tensor | None = None
    predicted: Tensor | None = None
    stem: list[StemStates] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and files, to which ``stem`` is of no use."""
        return {**vars(self), "stem": None}

    @property
    def lengths(self) -> Tensor:
        """Response tokens that count, shape (B,)."""
        return self.response_mask.sum(-1)

    @classmethod
    def cat(
        cls, parts: Sequence[Rollout], *, pad_id: int, pad_prompts: Literal["left", "right"]
    ) -> Rollout:
        """The responses of several rollouts, one after the other, groups numbered on.

        Args:
            parts: Rollouts of the same kind; all or none with ``logp`` and the like.
            pad_id: Stands where no token is.
            pad_prompts: The side on which shorter prompts are filled up.
        """
        joined: dict[str, Any] = {}
        for f in fields(cls):
            values = [getattr(part, f.name) for part in parts]
            if f.name == "groups":
                sizes = [0, *(int(groups.max()) + 1 if len(groups) else 0 for groups in values)]
                firsts = list(accumulate(sizes))
                values = [groups + first for groups, first in zip(values, firsts, strict=False)]
            elif f.name.endswith(("_ids", "_mask", "logp")) and f.name != "prompt_ids":
                side = "right" if f.name.startswith(("response", "logp")) else pad_prompts
                values = _as_wide(values, pad_id if f.name.endswith("_ids") else 0, side)
            joined[f.name] = _joined(values)
        return cls(**joined)

    def select(self, rows: Tensor) -> Rollout:
        """The responses at ``rows`` (a 1-d index or a mask), groups numbered anew."""
        index = rows.nonzero().squeeze(-1) if rows.dtype == torch.bool else rows
        picked: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                picked[f.name] = value[index.to(value.device)]
            elif isinstance(value, Preference):
                picked[f.name] = value[index.to(value.weights.device)]
            elif isinstance(value, list):
                picked[f.name] = [value[i] for i in index.tolist()]
            elif isinstance(value, Mapping):
                picked[f.name] = {k: [v[i] for i in index.tolist()] for k, v in value.items()}
            else:
                picked[f.name] = value
        picked["groups"] = picked["groups"].unique(return_inverse=True)[1]
        return Rollout(**picked)


def _joined(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(values)
    if isinstance(first, Preference):
        return Preference.cat(values)
    if isinstance(first, Mapping):
        return {name: _joined([value[name] for value in values]) for name in first}
    return None if any(v is None for v in values) else [item for v in values for item in v]


def _as_wide(values: list[Any], fill: int, side: str) -> list[Any]:
    """Tensors of shape (B, W), filled up to the widest; None stays None."""
    if values[0] is None:
        return values
    width = max(value.shape[1] for value in values)
    wide = []
    for value in values:
        gap = value.new_full((len(value), width - value.shape[1]), fill)
        wide.append(torch.cat([gap, value] if side == "left" else [value, gap], 1))
    return wide
