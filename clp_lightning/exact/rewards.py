"""The task's rewards, as ordinary rewards: what training sees of the enumeration."""

from __future__ import annotations

from typing import Any

from ..rewards import Reward
from ..types import Prompt
from .task import ExactTask

__all__ = ["ExactReward"]


class ExactReward(Reward):
    """One reward of an exact task, looked up by context and response.

    Args:
        task: The task; the same as the data's.
        index: Which of its rewards, 0 .. num_rewards - 1.
    """

    required_columns = ("context",)

    def __init__(self, task: ExactTask, index: int) -> None:
        if not 0 <= index < task.num_rewards:
            raise ValueError(f"index must lie in 0..{task.num_rewards - 1}, not {index}.")
        self.task = task
        self.index = index

    def __call__(
        self, prompts: list[Prompt], completions: list[Any], **columns: Any
    ) -> list[float | None]:
        """The table's entries.

        Raises:
            ValueError: where a prompt or a response is not the task's.
        """
        context = columns["context"]
        for prompt, x in zip(prompts, context, strict=True):
            if prompt != self.task.prompts[x]:
                raise ValueError(
                    f"Prompt {prompt!r} of context {x} belongs to another task than {self.task}; "
                    "give data and rewards the same one."
                )
        rows = self.task.rows(columns["completion_ids"])
        scores: list[float | None] = self.task.rewards[context, rows, self.index].tolist()
        return scores
