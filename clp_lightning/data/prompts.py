"""PromptDataModule: prompts from files, the hub, Python or the offline corpus."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import Dataset as TorchDataset

from .. import keyed
from ..types import PromptBatch
from .collate import PromptFormat, collate
from .corpus import Corpus
from .sampler import BatchKey, PromptLoader, PromptSampler, deal, row_order
from .sources import Source, as_source, has_splits, load_rows

__all__ = ["PromptDataModule", "PromptDataset"]


class PromptDataset(TorchDataset):
    """Rows of a data set as batches of prompts.

    Args:
        rows: The data.
        prompt_ids: Number of each row before splitting, int64, shape (N,).
        fmt: Says what of a row is the prompt.
    """

    def __init__(self, rows: Dataset, prompt_ids: torch.Tensor, fmt: PromptFormat) -> None:
        self.rows, self.prompt_ids, self.fmt = rows, prompt_ids, fmt

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def __getitem__(self, key: BatchKey) -> PromptBatch:
        ids = self.prompt_ids[list(key.rows)].tolist()
        return collate([self.rows[i] for i in ids], ids, self.fmt, key)

    @cached_property
    def lengths(self) -> list[int]:
        """Letters of every row's columns together."""
        rows = self.rows.select(self.prompt_ids.tolist())
        return [sum(len(str(value)) for value in row.values()) for row in rows]


class PromptDataModule(LightningDataModule):
    """Prompts for training and evaluation.

    Accepts TRL's formats: ``prompt`` (a string or messages), ``prompt`` with ``completion`` or
    with ``chosen`` and ``rejected``, ``messages``, ``text``. Every other column reaches the
    rewards, one value per response.

    Args:
        source: A folder, a .jsonl, .json, .csv or .parquet file, a data set's name on the hub
            (``NAME@REVISION`` for a branch, tag or commit), a ``datasets.Dataset``, a pandas
            DataFrame, or ``docstrings``, the corpus that needs no download.
        source_config: Configuration of a hub data set.
        split: Split of the source to train on.
        eval_source: Where the prompts of validate, test and predict come from, if not from rows
            held out of ``source``.
        eval_split: Split to evaluate on, of ``eval_source`` or of ``source``.
        holdout: Rows (or share of rows, below 1) kept out of training for evaluation. The same
            rows for every ``seed``. Documents, where a corpus makes several rows of each. Default:
            a twentieth, or none where ``eval_source`` or ``eval_split`` is given.
        eval_prompts: Evaluate on this many of them only.
        columns: Our name to the name in the data, for each column to rename. A column that is
            named here appears under its new names only; it may be given several.
        template: Makes the prompt of a row, e.g. ``"Summarise: {document}"``.
        system: System message for string prompts; needs ``conversational``.
        conversational: Turn string prompts into a conversation, so that the model's chat template
            is applied.
        batch_size: Prompts per training step and process.
        eval_batch_size: Prompts per evaluation step and process; by default ``batch_size``.
        group_by_length: Make batches of rows of like length (letters of all their texts), which
            leaves less padding to compute; batches come in no order.
        num_workers: Processes that prepare batches.
        seed: Order of the training prompts; by default the seed of ``seed_everything``.
        limit: Use only the first rows of the source, for a quick try.
    """

    #: What makes a prompt of a row.
    format_class: type[PromptFormat] = PromptFormat

    def __init__(
        self,
        # Path last of what a config may name: jsonargparse writes as one whatever has a text.
        source: str | Corpus | Path | Dataset | pd.DataFrame = "docstrings",
        source_config: str | None = None,
        split: str = "train",
        eval_source: str | Corpus | Path | Dataset | pd.DataFrame | None = None,
        eval_split: str | None = None,
        holdout: int | float | None = None,
        eval_prompts: int | None = None,
        columns: dict[str, str] | None = None,
        template: str | None = None,
        system: str | None = None,
        conversational: bool = False,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        group_by_length: bool = False,
        num_workers: int = 0,
        seed: int | None = None,
        limit: int | None = None,
    ) -> None:
        super().__init__()
        self.source = as_source("source", source)
        self.eval_source = None if eval_source is None else as_source("eval_source", eval_source)
        sizes = {
            "batch_size": batch_size,
            "eval_batch_size": eval_batch_size,
            "eval_prompts": eval_prompts,
            "limit": limit,
        }
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, not {size}.")
        own_eval = eval_source is not None or eval_split is not None
        if own_eval and holdout:
            raise ValueError("Give holdout, or eval_source and eval_split, not both.")
        if eval_split is not None and (
            not has_splits(self._evaluated_source) or (eval_source is None and eval_split == split)
        ):
            raise ValueError(
                f"eval_split '{eval_split}' must be another split of a folder or hub data set; "
                "for a file, a Dataset or the docstrings use holdout or eval_source."
            )
        if holdout is None:
            holdout = 0 if own_eval else 0.05
        if not 0 <= holdout < math.inf or (holdout > 1 and holdout != int(holdout)):
            raise ValueError(f"holdout is a number of rows or a share below 1, not {holdout}.")
        self.source_config, self.split, self.eval_split = source_config, split, eval_split
        self.holdout, self.eval_prompts, self.limit = holdout, eval_prompts, limit
        self.columns, self.template = dict(columns or {}), template
        self.system, self.conversational = system, conversational
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        keyed.resolve_seed(seed)  # an early error; "by default" is decided when training starts
        self.group_by_length, self.num_workers, self.seed = group_by_length, num_workers, seed
        self._fits = False
        self._train: PromptDataset | None = None
        self._eval: PromptDataset | None = None
        self._train_sampler: PromptSampler | None = None
        self._position: dict[str, int] | None = None

    # ---------------------------------------------------------------- loading

    def prepare_data(self) -> None:
        """Download, or read, on one process; the others find it in the cache."""
        for source, split in self._sources():
            if not isinstance(source, Dataset):
                load_rows(source, self.source_config, split)

    def setup(self, stage: str | None = None) -> None:
        """Load the rows, check them, hold some out.

        Raises:
            ValueError: for unknown or reserved columns, an empty data set, an empty prompt, fewer
                training prompts than a batch.
        """
        self._fits = stage == "fit"
        if self._train is None:
            self._load_all()
        if self._fits:
            self._new_sampler()  # too few prompts for a batch: an error before a model is loaded

    def _load_all(self) -> None:
        train, *evaluation = [self._load(source, split) for source, split in self._sources()]
        if evaluation:
            self._train, self._eval = train, evaluation[0]
        else:
            units = _units(train.rows, getattr(self.source, "split_by", None))
            held_out = self._num_held_out(len(units))
            order = _split_order(len(units)).tolist()
            ids = [
                torch.tensor([i for unit in part for i in units[unit]], dtype=torch.long)
                for part in (sorted(order[held_out:]), order[:held_out])
            ]
            self._train, self._eval = (PromptDataset(train.rows, i, train.fmt) for i in ids)
        self._eval.prompt_ids = self._eval.prompt_ids[: self.eval_prompts]

    @property
    def column_names(self) -> list[str]:
        """Columns that the rewards will see; known after ``setup``."""
        batch = next(iter(self.statistics_batches(1)))
        return list(batch.columns)

    @property
    def has_eval_prompts(self) -> bool:
        """Whether any prompts were held out or given for evaluation; known after ``setup``."""
        self._ready()
        return self._eval is not None and len(self._eval) > 0

    @property
    def _evaluated_source(self) -> Source:
        return self.source if self.eval_source is None else self.eval_source

    def _sources(self) -> list[tuple[Source, str]]:
        sources = [(self.source, self.split)]
        if self.eval_source is not None or self.eval_split is not None:
            sources.append((self._evaluated_source, self.eval_split or self.split))
        return sources

    def _load(self, source: Source, split: str) -> PromptDataset:
        rows = load_rows(source, self.source_config, split)
        if self.limit is not None:
            rows = rows.select(range(min(self.limit, len(rows))))
        if len(rows) == 0:
            raise ValueError(f"The data set {_name(source)} (split '{split}') has no rows.")
        template = self.template
        if template is None and isinstance(source, Corpus):
            template = source.template
        fmt = self.format_class(
            rows.column_names, self.columns, template, self.system, self.conversational
        )
        fmt.check(rows)
        return PromptDataset(rows, torch.arange(len(rows)), fmt)

    def _num_held_out(self, num_rows: int) -> int:
        if self.holdout == 0:
            return 0
        number = int(self.holdout) if self.holdout >= 1 else max(1, int(num_rows * self.holdout))
        if number >= num_rows:
            raise ValueError(
                f"holdout {self.holdout} leaves nothing of {num_rows} rows to train on; lower it."
            )
        return number

    # ---------------------------------------------------------------- position

    # The loader's state is in the checkpoint as well, but Lightning 2.6 does not load it back
    # from a checkpoint of an epoch's end.
    def state_dict(self) -> dict[str, int]:
        """Where the training prompts are: pass and position."""
        return {} if self._train_sampler is None else self._train_sampler.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue there, at the next ``train_dataloader()`` of the fit that is resumed."""
        if self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING:
            self._position = state_dict

    # ---------------------------------------------------------------- loaders

    def train_dataloader(self) -> PromptLoader:
        """Shuffled by (seed, epoch); every batch ``rollout_batches`` times."""
        sampler = self._new_sampler()
        if self._position is not None:
            sampler.load_state_dict(self._position)
            self._position = None
        self._train_sampler = sampler
        return self._loader(self._ready(), sampler)

    def _new_sampler(self) -> PromptSampler:
        """Of the training prompts, at the start of the trainer's epoch."""
        trainer = self.trainer
        if getattr(trainer, "overfit_batches", 0):
            raise ValueError("overfit_batches would replace the sampler; use limit=N instead.")
        sampler = PromptSampler(
            len(self._ready()),
            self.batch_size,
            seed=keyed.resolve_seed(self.seed),
            parts=getattr(trainer and trainer.lightning_module, "rollout_batches", 1),
            epoch=0 if trainer is None else trainer.current_epoch,
            drop_last=True,
            lengths=self._ready().lengths if self.group_by_length else None,
            **self._place(),
        )
        if trainer is not None:
            sampler.limit_pass(trainer.limit_train_batches)
        return sampler

    def val_dataloader(self) -> PromptLoader | list[Any]:
        """The held-out prompts in a fixed order; a batch may come twice under DDP.

        Raises:
            ValueError: there are none; ``fit`` goes without.
        """
        return [] if self._fits and not self.has_eval_prompts else self._eval_loader()

    def test_dataloader(self) -> PromptLoader:
        """The same prompts as ``val_dataloader``."""
        return self._eval_loader()

    def predict_dataloader(self) -> PromptLoader:
        """The same prompts as ``val_dataloader``."""
        return self._eval_loader()

    def statistics_batches(self, num_prompts: int) -> Iterator[PromptBatch]:
        """The first prompts of the first pass, dealt to processes; moves no position.

        Args:
            num_prompts: How many over all processes; fewer where there are fewer. Every process
                gets equally many batches, so some prompts may come twice.
        """
        data = self._ready()
        order = row_order(len(data), seed=keyed.resolve_seed(self.seed), epoch=0)[:num_prompts]
        for rows in deal(order, self.batch_size, drop_last=False, **self._place()):
            yield data[BatchKey(rows, 0, 0, 1, self.batch_size)]

    def _ready(self) -> PromptDataset:
        if self._train is None:
            raise RuntimeError("Call setup() first; a Trainer does.")
        return self._train

    def _eval_loader(self) -> PromptLoader:
        if not self.has_eval_prompts:
            raise ValueError("There are no prompts to evaluate on: set holdout or eval_split.")
        assert self._eval is not None
        sampler = PromptSampler(
            len(self._eval), self.eval_batch_size, drop_last=False, **self._place()
        )
        return self._loader(self._eval, sampler)

    def _loader(self, data: PromptDataset, sampler: PromptSampler) -> PromptLoader:
        return PromptLoader(data, batch_size=None, sampler=sampler, num_workers=self.num_workers)

    def _place(self) -> dict[str, Any]:
        """This process among those that share the data."""
        kwargs: Mapping[str, Any] | None = (
            None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        )
        if kwargs is None:
            return {"rank": 0, "world_size": 1}
        return {"rank": kwargs["rank"], "world_size": kwargs["num_replicas"]}


def _units(rows: Dataset, split_by: str | None) -> list[list[int]]:
    """Rows that are held out together: those that agree in a column, or each for itself."""
    if split_by is None:
        return [[row] for row in range(len(rows))]
    units: dict[Any, list[int]] = {}
    for row, value in enumerate(rows[split_by]):
        units.setdefault(value, []).append(row)
    return list(units.values())


def _split_order(num_units: int) -> torch.Tensor:
    # Not keyed by the seed: runs of other seeds, and the warm-up that made the reference, must
    # hold out the same rows.
    return torch.randperm(num_units, generator=keyed.generator(2**32))


def _name(source: Source) -> str:
    return f"'{source}'" if isinstance(source, str) else type(source).__name__
