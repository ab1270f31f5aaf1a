"""Rows of a data set to a PromptBatch, in any of TRL's formats."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from math import isnan
from string import Formatter
from typing import TYPE_CHECKING, Any

import torch

from ..types import REWARD_ARGUMENTS, Prompt, PromptBatch
from .sampler import BatchKey

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["RESERVED", "PromptFormat", "check_columns", "collate"]

RESERVED = ("weights", "alpha", *REWARD_ARGUMENTS)
"""Names that rewards receive from the trainer, so no column may have them."""

_PROMPT_COLUMNS = ("prompt", "messages", "text")
_MESSAGE_COLUMNS = ("prompt", "messages", "completion", "chosen", "rejected")


def check_columns(columns: Collection[str]) -> None:
    """Refuse columns that would hide an argument of a reward.

    Raises:
        ValueError: naming the columns.
    """
    clash = [name for name in columns if name in RESERVED]
    if clash:
        raise ValueError(
            f"Column {clash} has a reserved name (rewards receive {', '.join(RESERVED)} from the "
            f"trainer). Rename it: columns={{'my_{clash[0]}': '{clash[0]}'}}."
        )


class PromptFormat:
    """How a row becomes a prompt.

    Without a template, one of TRL's formats: ``prompt`` (a string or messages), ``messages``
    (all but the final assistant turn is the prompt, that turn is the completion) or ``text``.

    Args:
        columns: Columns of the data.
        rename: New name to name in the data. A column named here appears under its new names
            only, of which there can be several.
        template: A string with columns (after renaming) in braces.
        system: A system message put before string prompts.
        conversational: Make string prompts a conversation of one user turn.

    Raises:
        ValueError: where the columns give no prompt, or one that is named does not exist.
    """

    def __init__(
        self,
        columns: Collection[str],
        rename: Mapping[str, str] | None = None,
        template: str | None = None,
        system: str | None = None,
        conversational: bool = False,
    ) -> None:
        self.template, self.system, self.conversational = template, system, conversational
        if system is not None and not conversational:
            raise ValueError("A system message needs a conversation: set conversational=true.")
        self.columns = _renamed(columns, rename or {})
        check_columns(self.columns)
        names = ", ".join(sorted(self.columns))
        self.source = next((name for name in _PROMPT_COLUMNS if name in self.columns), None)
        self.prompt_columns = [self.source] if self.source else []
        self.inserted: list[tuple[str, str | None]] = []  # by the template; with "!r" or the like
        if template is not None:
            parsed = Formatter().parse(template)
            self.inserted = [(name, as_) for _, name, _, as_ in parsed if name is not None]
            # "{meta[title]}" and "{meta.title}" read the column "meta".
            columns_ = {re.split(r"[.\[]", name)[0] for name, _ in self.inserted}
            self.prompt_columns = sorted(columns_)
            unknown = [name for name in self.prompt_columns if name not in self.columns]
            if unknown:
                raise ValueError(f"The template names {unknown}; the columns are: {names}.")
        elif self.source is None:
            raise ValueError(
                f"No column is called prompt, messages or text (there are: {names}). Map one, "
                "columns={'prompt': NAME}, or give a template such as 'Summarise: {NAME}'."
            )

    def check(self, rows: Dataset) -> None:
        """Build every prompt once.

        Raises:
            ValueError: naming the first row whose prompt is empty or no prompt at all.
        """
        needed = [self.columns[name] for name in self.prompt_columns]
        for number, row in enumerate(rows.select_columns(sorted(set(needed)))):
            self._prompt({name: row[self.columns[name]] for name in self.prompt_columns}, number)

    def __call__(self, row: Mapping[str, Any], prompt_id: int) -> tuple[Prompt, dict[str, Any]]:
        """The prompt of a row, and the columns that travel beside it.

        Raises:
            ValueError: naming the row whose prompt is empty or no prompt at all.
        """
        rest = {name: row[old] for name, old in self.columns.items()}
        for name in _MESSAGE_COLUMNS:
            if isinstance(rest.get(name), list):
                rest[name] = _without_none(rest[name])
        prompt = self._prompt(rest, prompt_id)
        if self.template is None:
            source = rest.pop(self.prompt_columns[0])
            if self.source == "messages":
                rest["completion"] = source[len(prompt) :] or None
        return prompt, rest

    def _prompt(self, row: dict[str, Any], prompt_id: int) -> Prompt:
        prompt: Any
        if self.template is None:
            prompt = row[self.prompt_columns[0]]
        else:
            self._check_inserted(row, prompt_id)
            prompt = self.template.format_map(row)
        if isinstance(prompt, list):
            if not all(isinstance(m, dict) and m.get("role") for m in prompt):
                raise ValueError(f"Row {prompt_id} has a message without a role: {prompt!r}.")
            if self.source == "messages" and prompt and prompt[-1]["role"] == "assistant":
                prompt = prompt[:-1]
        elif not isinstance(prompt, (str, type(None))):
            kind = type(prompt).__name__
            raise ValueError(f"Row {prompt_id}: the prompt is a {kind}, not text or messages.")
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            raise ValueError(f"Row {prompt_id} has an empty prompt; fill it or leave it out.")
        if isinstance(prompt, str) and self.conversational:
            system = [{"role": "system", "content": self.system}] if self.system else []
            prompt = [*system, {"role": "user", "content": prompt}]
        return prompt

    def _check_inserted(self, row: Mapping[str, Any], prompt_id: int) -> None:
        """Python would write None, or a list with its brackets, into the prompt."""
        for name in self.prompt_columns:
            if row[name] is None:
                raise ValueError(
                    f"Row {prompt_id}: its '{name}', which the template names, is missing; fill it "
                    "or leave the row out."
                )
        for name, as_ in self.inserted:
            value = Formatter().get_field(name, (), row)[0]
            if value is None or (isinstance(value, float) and isnan(value)):
                raise ValueError(
                    f"Row {prompt_id}: its '{name}', which the template names, is {value}; fill it "
                    "or leave the row out."
                )
            if isinstance(value, (list, dict)) and as_ is None:
                raise ValueError(
                    f"Row {prompt_id}: its '{name}' is a {type(value).__name__}; the template "
                    f"takes text and numbers, or a part of it: {{{name}[...]}}."
                )


def collate(
    rows: Sequence[Mapping[str, Any]],
    prompt_ids: Sequence[int],
    fmt: PromptFormat,
    key: BatchKey | None = None,
) -> PromptBatch:
    """Rows to a batch of P prompts.

    Args:
        rows: P rows, all with the same columns.
        prompt_ids: Their numbers in the data before splitting.
        fmt: Says what of a row is the prompt.
        key: Epoch and part of the batch.

    Returns:
        The batch; every column but the prompt's is a list of length P.
    """
    pairs = [fmt(row, i) for row, i in zip(rows, prompt_ids, strict=True)]
    columns = {name: [rest[name] for _, rest in pairs] for name in pairs[0][1]}
    batch = PromptBatch(
        [prompt for prompt, _ in pairs], torch.tensor(prompt_ids, dtype=torch.long), columns
    )
    if key is not None:
        batch.epoch, batch.part, batch.parts = key.epoch, key.part, key.parts
        batch.nominal_size = key.nominal_size
    return batch


def _renamed(columns: Collection[str], rename: Mapping[str, str]) -> dict[str, str]:
    """Every name that a row will have, and its name in the data."""
    unknown = [name for name in rename.values() if name not in columns]
    if unknown:
        raise ValueError(f"columns names {unknown}; the data has: {', '.join(sorted(columns))}.")
    names = {name: name for name in columns if name not in rename.values()}
    hidden = [name for name in rename if name in names]
    if hidden:
        raise ValueError(f"columns would replace {hidden}, which the data has already.")
    return names | dict(rename)


def _without_none(value: Any) -> Any:
    """``value`` without None-valued keys, which ``datasets`` adds where rows differ."""
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value
