"""What a reward model learns: to rank pairs, to name a class, or to predict a number."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..described import Described
from ..functional.ranking import bradley_terry_loss
from ..rewards import completion_text
from ..types import Message, Prompt, PromptBatch

__all__ = ["ClassLabels", "PreferencePairs", "ScalarLabels", "Supervision"]

Text = str | list[Message]
"""What is scored: a plain text, or a whole conversation."""

Pair = tuple[str, str]
"""Prompt and answer for a cross-encoder, which reads them as two texts."""


class Supervision(Described, ABC):
    """Targets in the data, and the loss that a head has on them.

    Attributes:
        outputs: Names of the head's outputs.
        problem_type: What Transformers calls the task.
        required_columns: Columns of the data that it cannot do without.
    """

    outputs: Sequence[str] = ("reward",)
    problem_type: str | None = None
    required_columns: tuple[str, ...] = ()

    def check(self, batch: PromptBatch) -> None:
        """Refuse data that cannot be learned from.

        Raises:
            ValueError: names the column that is missing or the first row that is wrong.
        """
        if missing := [name for name in self.required_columns if name not in batch.columns]:
            raise ValueError(
                f"The data has no column {missing} to learn from; it has "
                f"{sorted(batch.columns)} beside the prompt. Map one: "
                f"columns={{'{missing[0]}': NAME}}."
            )
        for row, (prompt_id, prompt) in enumerate(
            zip(batch.prompt_ids.tolist(), batch.prompts, strict=True)
        ):
            columns = {name: values[row] for name, values in batch.columns.items()}
            if why := self.fault(prompt, columns):
                raise ValueError(f"Row {prompt_id}: {why}. Mend the row or leave it out.")

    @abstractmethod
    def fault(self, prompt: Prompt, columns: Mapping[str, Any]) -> str | None:
        """What is wrong with a row, or None."""

    @abstractmethod
    def answered(self, batch: PromptBatch) -> list[tuple[Prompt, Any]]:
        """Prompt and answer of every text that is scored; an answer may be None."""

    def texts(self, batch: PromptBatch) -> list[Text]:
        """What is scored of a batch of B rows, prompt and answer as one text."""
        return [_whole(prompt, answer) for prompt, answer in self.answered(batch)]

    def pairs(self, batch: PromptBatch) -> list[Pair]:
        """What is scored of a batch of B rows, prompt and answer as two texts.

        Raises:
            ValueError: names a row whose prompt is a conversation.
        """
        if chats := [i for i, p in enumerate(batch.prompts) if not isinstance(p, str)]:
            raise ValueError(
                f"Row {int(batch.prompt_ids[chats[0]])} is a conversation; a cross-encoder reads "
                "prompt and answer as two plain texts. Leave out cross_encoder or use texts."
            )
        return [(str(p), completion_text(answer or "")) for p, answer in self.answered(batch)]

    @abstractmethod
    def losses(self, scores: Tensor, batch: PromptBatch) -> Tensor:
        """Loss of every row, shape (B,), of the scores of ``texts``, shape (texts, outputs)."""

    @abstractmethod
    def decisions(self, scores: Tensor, batch: PromptBatch) -> tuple[Tensor, Tensor] | None:
        """Probability of what was decided, and whether it was right, shapes (B,); or None."""

    def ranking(self, scores: Tensor, batch: PromptBatch) -> tuple[Tensor, Tensor] | None:
        """Score of every text, and whether it is a good one, shapes (texts,); or None.

        The texts are those of ``answered``: row b of the batch is text b, B + b and so on.
        """
        return None


class PreferencePairs(Supervision):
    """``chosen`` is better than ``rejected``: Bradley-Terry, with the column ``margin`` if any.

    Args:
        absolute: Weight of a second loss, the mean cross-entropy of the two texts by themselves:
            the chosen one is good with probability sigmoid(score), the rejected one is not. It
            makes scores of different prompts comparable, which pairs do not.
    """

    required_columns = ("chosen", "rejected")

    def __init__(self, absolute: float = 0.0) -> None:
        if absolute < 0:
            raise ValueError(f"absolute must not be negative; it is {absolute}.")
        self.absolute = absolute

    def fault(self, prompt: Prompt, columns: Mapping[str, Any]) -> str | None:
        chosen, rejected = (columns[name] for name in self.required_columns)
        for name in self.required_columns:
            # Nothing may be the worse answer to a prompt.
            nothing = name == "rejected" and bool(prompt) and columns[name] == ""
            if not nothing and not _has_text(columns[name]):
                return f"{name} is {columns[name]!r}; it must be text or messages, and not empty"
        if chosen == rejected:
            return f"chosen and rejected are the same, {chosen!r}"
        if "margin" in columns and not _is_number(columns["margin"]):
            return f"the margin is {columns['margin']!r}; it must be a finite number"
        return None

    def answered(self, batch: PromptBatch) -> list[tuple[Prompt, Any]]:
        """The B chosen answers, then the B rejected ones."""
        return [
            (prompt, answer)
            for name in self.required_columns
            for prompt, answer in zip(batch.prompts, batch.columns[name], strict=True)
        ]

    def losses(self, scores: Tensor, batch: PromptBatch) -> Tensor:
        chosen, rejected = scores[:, 0].chunk(2)
        margin = None
        if "margin" in batch.columns:
            margin = torch.tensor(batch.columns["margin"]).to(scores)
        alone = -(F.logsigmoid(chosen) + F.logsigmoid(-rejected)) / 2
        return bradley_terry_loss(chosen, rejected, margin) + self.absolute * alone

    def decisions(self, scores: Tensor, batch: PromptBatch) -> tuple[Tensor, Tensor]:
        chosen, rejected = scores[:, 0].chunk(2)
        # Of the winner, whichever it is: "the chosen one" is right by definition.
        return (chosen - rejected).abs().sigmoid(), chosen > rejected

    def ranking(self, scores: Tensor, batch: PromptBatch) -> tuple[Tensor, Tensor]:
        return scores[:, 0], torch.arange(len(scores), device=scores.device) < len(batch)


class _Labels(Supervision):
    required_columns: tuple[str, ...] = ("label",)

    def fault(self, prompt: Prompt, columns: Mapping[str, Any]) -> str | None:
        text = _whole(prompt, columns.get("completion"))
        if not _has_text(text):
            return f"the text is {text!r}; it must not be empty"
        faults = (self.fault_of_label(columns[name], name) for name in self.required_columns)
        return next(filter(None, faults), None)

    @abstractmethod
    def fault_of_label(self, label: Any, name: str) -> str | None:
        """What is wrong with a label of a column, or None."""

    def answered(self, batch: PromptBatch) -> list[tuple[Prompt, Any]]:
        answers = batch.columns.get("completion", [None] * len(batch))
        return list(zip(batch.prompts, answers, strict=True))


class ClassLabels(_Labels):
    """``label`` is one of several classes, by number or by name: cross-entropy.

    Args:
        names: The classes, in the order of their numbers.
    """

    problem_type = "single_label_classification"

    def __init__(self, names: list[str]) -> None:
        if len(names) < 2 or len(set(names)) < len(names):
            raise ValueError(f"names must be two or more different classes, not {names}.")
        self.outputs = list(names)

    def fault_of_label(self, label: Any, name: str) -> str | None:
        known = label in self.outputs if isinstance(label, str) else self._is_class(label)
        names = ", ".join(self.outputs)
        return None if known else f"the {name} is {label!r}; classes are 0, 1, … of {names}"

    def _is_class(self, label: Any) -> bool:
        return isinstance(label, int) and 0 <= label < len(self.outputs)

    def losses(self, scores: Tensor, batch: PromptBatch) -> Tensor:
        return F.cross_entropy(scores, self._targets(batch).to(scores.device), reduction="none")

    def decisions(self, scores: Tensor, batch: PromptBatch) -> tuple[Tensor, Tensor]:
        probability, decided = scores.softmax(-1).max(-1)
        return probability, decided == self._targets(batch).to(scores.device)

    def ranking(self, scores: Tensor, batch: PromptBatch) -> tuple[Tensor, Tensor] | None:
        """Of two classes the second is the good one; of more none is."""
        if len(self.outputs) > 2:
            return None
        return scores[:, 1] - scores[:, 0], self._targets(batch).to(scores.device) == 1

    def _targets(self, batch: PromptBatch) -> Tensor:
        numbers = {name: number for number, name in enumerate(self.outputs)}
        return torch.tensor([numbers.get(label, label) for label in batch.columns["label"]])


class ScalarLabels(_Labels):
    """A number, such as a rating, or several, each by a head of its own: mean squared error.

    Args:
        columns: Where the numbers are; each column has a head on the common trunk, with its name.
            One column, ``label``, if None.
    """

    problem_type = "regression"

    def __init__(self, columns: list[str] | None = None) -> None:
        if columns is not None:
            if not columns or len(set(columns)) < len(columns):
                raise ValueError(f"columns must be different names, at least one, not {columns}.")
            self.outputs = self.required_columns = tuple(columns)

    def fault_of_label(self, label: Any, name: str) -> str | None:
        return None if _is_number(label) else f"the {name} is {label!r}; it must be a finite number"

    def losses(self, scores: Tensor, batch: PromptBatch) -> Tensor:
        """Mean over the heads, as Transformers has it for a regression."""
        targets = torch.tensor([batch.columns[name] for name in self.required_columns])
        return ((scores - targets.T.to(scores)) ** 2).mean(-1)

    def decisions(self, scores: Tensor, batch: PromptBatch) -> None:
        return None


def _whole(prompt: Prompt, answer: Any) -> Text:
    """Prompt and answer together, as ``ClassifierHead`` puts them."""
    if isinstance(prompt, str) and (prompt or not isinstance(answer, list)):
        return prompt + completion_text(answer or "")
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    return [*prompt, *(answer or [])]


def _has_text(value: Any) -> bool:
    if isinstance(value, list):
        messages = all(isinstance(m, dict) and m.get("role") for m in value)
        return bool(value) and messages and _has_text(value[-1].get("content"))
    return isinstance(value, str) and bool(value.strip())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
