"""The exact task as ordinary data: its contexts are the prompts."""

from __future__ import annotations

from datasets import Dataset

from ..data import PromptDataModule
from .base import build_base
from .task import ExactTask

__all__ = ["ExactDataModule"]


class ExactDataModule(PromptDataModule):
    """Prompts of an exact task, with the column ``context`` that its rewards need.

    A pass over the data holds every context several times, shuffled; the copies are different
    prompts, so their responses are drawn independently. Evaluation sees every context once.
    Neither sees the task's unseen contexts: a front is of what was trained, and the closed gap
    of ``ExactFrontCallback`` tells both kinds apart.

    Args:
        task: The task.
        folder: Where the base lives; built here before the model is loaded, if it is missing.
            Give the module the same folder as ``pretrained``.
        copies: How often each context appears in a pass.
        batch_size: Prompts per training step and process.
        eval_batch_size: Prompts per evaluation step and process; by default all.
        num_workers: Processes that prepare batches.
        seed: Order of the training prompts; by default the seed of ``seed_everything``.
    """

    def __init__(
        self,
        task: ExactTask,
        folder: str,
        copies: int = 100,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        if copies < 1:
            raise ValueError(f"copies must be at least 1, not {copies}.")
        contexts = (~task.unseen).nonzero().flatten().tolist()
        prompts = [task.prompts[x] for x in contexts]
        super().__init__(
            source=Dataset.from_dict({"prompt": prompts * copies, "context": contexts * copies}),
            eval_source=Dataset.from_dict({"prompt": prompts, "context": contexts}),
            batch_size=batch_size,
            eval_batch_size=eval_batch_size or len(contexts),
            num_workers=num_workers,
            seed=seed,
        )
        self.task = task
        self.folder = folder

    def prepare_data(self) -> None:
        """Trains and saves the base; Lightning calls this before it loads the model."""
        build_base(self.task, self.folder)
