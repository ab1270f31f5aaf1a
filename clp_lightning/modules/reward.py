"""RewardModule: a reward head, from preference pairs or from labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAUROC, BinaryCalibrationError

from ..keyed import resolve_seed
from ..policy.classifier import Classifier
from ..pretrained import Pretrained
from ..types import PromptBatch
from .base import LRDecay, PolicyModule
from .folder import replace_folder
from .gathered import on_one_device
from .precision import float32_by_default
from .sharding import shard
from .supervision import PreferencePairs, Supervision
from .tally import Tally

__all__ = ["RewardModule"]


class RewardModule(PolicyModule):
    """Trains a sequence classifier and writes a plain Hugging Face folder.

    The loss is the mean over the rows of the whole batch, over all ranks and accumulated batches;
    all weights are trained (``train_embeddings`` is the exception), without dropout. The folder,
    ``<trainer.log_dir>/reward``, is a reward: ``ClassifierHead(folder)``. Validation logs the share
    of right decisions, the expected calibration error of their probabilities (Guo et al. 2017, ten
    equal bins), and ``val/auc``: how often a good text of any row has a higher score than a bad one
    of any row (chosen and rejected, or the second and the first of two classes).

    Args:
        pretrained: The trunk, a language model, an encoder or a classifier: a hub name, a folder
            or an installed package. A head for other outputs than the supervision's is replaced.
        supervision: What is learned; ``PreferencePairs()`` if None.
        max_length: Longer texts lose their beginning; how many is logged.
        cross_encoder: Prompt and answer are two texts to the model, and the prompt is cut, at its
            end; an answer only where it leaves no room. The reward is ``CrossEncoderHead(folder)``.
        auc_by: A column; ``val/auc/<value>`` is logged for the rows of each of its values.
        lr: Learning rate.
        weight_decay: Weight decay.
        warmup_steps: Optimizer steps over which the learning rate rises.
        lr_decay: How the learning rate falls to 0 at the end of the run.
        optimizer: Optimizer class and its further arguments.
        lr_scheduler: Scheduler class and its arguments, stepped once per optimizer step.
        seed: Key of a new head; that of ``seed_everything`` if None.
        train_embeddings: Whether the words' embeddings, half the weights of a small model, are
            trained too; a step without them is faster and needs less memory.
    """

    policy: Classifier
    exact_when_frozen = True  # the folder holds all weights, in one precision

    def __init__(
        self,
        pretrained: str | Pretrained,
        supervision: Supervision | None = None,
        max_length: int = 512,
        cross_encoder: bool = False,
        auc_by: str | None = None,
        lr: float = 2e-5,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        lr_decay: LRDecay = "none",
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int | None = None,
        train_embeddings: bool = True,
    ) -> None:
        supervision = supervision or PreferencePairs()
        policy = Classifier(
            pretrained,
            supervision.outputs,
            supervision.problem_type,
            max_length,
            train_embeddings,
        )
        schedule = (warmup_steps, lr_decay, optimizer, lr_scheduler)
        super().__init__(policy, lr, None, weight_decay, *schedule)
        self.supervision = supervision
        self.seed = resolve_seed(seed)
        self._tallies = {"train": Tally(), "val": Tally()}
        self.accuracy = MeanMetric()
        self.calibration_error = BinaryCalibrationError(n_bins=10, norm="l1")
        self.cross_encoder, self.auc_by = cross_encoder, auc_by
        self.auc = BinaryAUROC()
        self.auc_values: list[str] = []
        self.aucs = torch.nn.ModuleList()
        self._told_of_cuts = False

    def setup(self, stage: str) -> None:
        data: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "every_batch"):  # before the model is loaded
            for batch in data.every_batch():
                self.supervision.check(batch)
            # Known to all ranks before any of them sees a row of a kind.
            self.auc_values = sorted({v for b in data.eval_batches() for v in self._groups(b)})
            self.aucs = torch.nn.ModuleList(BinaryAUROC() for _ in self.auc_values)

    def configure_model(self) -> None:
        with float32_by_default():
            self.policy.build(seed=self.seed)
        shard(self)

    @property
    def tally(self) -> Tally:
        """Sums of training or of validation, which may come between two micro-batches."""
        return self._tallies["train" if self.training else "val"]

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        losses = self.supervision.losses(self.scores(batch), batch)
        self.tally.add("loss", losses)
        self.tally.count("rows", len(losses))
        # The gradient is rescaled to the mean over all rows below.
        return losses.sum()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        step = self.tally.reduce(self.sum_over_ranks)
        self.scale_gradients(1.0, step.pop("rows"))
        for name, value in step.items():
            self.log(f"train/{name}", value, prog_bar=name == "loss")

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        scores = self.scores(batch)
        self.tally.add("loss", self.supervision.losses(scores, batch))
        if (decisions := self.supervision.decisions(scores, batch)) is not None:
            probability, right = decisions
            self.accuracy.update(right.float())
            self.calibration_error.update(probability, right.long())
            metrics = {"accuracy": self.accuracy, "calibration_error": self.calibration_error}
            for name, metric in metrics.items():
                self.log(f"val/{name}", metric, prog_bar=name == "accuracy")
        if (ranking := self.supervision.ranking(scores, batch)) is not None:
            ranked, good = ranking
            self._update_aucs(ranked, good, self._groups(batch))

    def _groups(self, batch: PromptBatch) -> list[str]:
        """The value of every row's ``auc_by``."""
        if self.auc_by is None:
            return []
        if self.auc_by not in batch.columns:
            raise ValueError(
                f"auc_by names the column '{self.auc_by}'; there are {sorted(batch.columns)}."
            )
        return [str(value) for value in batch.columns[self.auc_by]]

    def _update_aucs(self, scores: Tensor, good: Tensor, groups: list[str]) -> None:
        # In double, else large scores are ties. Probabilities, because torchmetrics would make them
        # of one batch's scores and not of another's.
        scores, good = scores.double().sigmoid(), good.long()
        everywhere = torch.ones_like(good, dtype=torch.bool)
        rows = groups * (len(scores) // max(len(groups), 1))
        aucs: Any = self.aucs
        parts = {"auc": (self.auc, everywhere)}
        for value, metric in zip(self.auc_values, aucs, strict=True):
            here = torch.tensor([row == value for row in rows], device=scores.device)
            parts[f"auc/{value}"] = (metric, here)
        for name, (metric, where) in parts.items():
            metric.update(scores[where], good[where])
            self.log(f"val/{name}", metric)

    def on_validation_epoch_end(self) -> None:
        step = self.tally.reduce(self.sum_over_ranks)
        for name, value in step.items():
            self.log(f"val/{name}", value, prog_bar=name == "loss")

    def scores(self, batch: PromptBatch) -> Tensor:
        """The head's outputs for the supervision's texts, shape (texts, outputs).

        Raises:
            ValueError: for rows that cannot be learned from.
        """
        self.supervision.check(PromptBatch.check(batch))
        read = self.supervision.pairs if self.cross_encoder else self.supervision.texts
        texts, index = _each_once(read(batch))
        inputs, cut = self.policy.tokens(texts)
        cut = cut[index]
        self.tally.add("truncated", cut)
        if cut.any() and not self._told_of_cuts:
            self._told_of_cuts = True
            lost = "the end of their prompt" if self.cross_encoder else "their beginning"
            rank_zero_warn(
                f"{int(cut.sum())} of {len(cut)} texts of a batch are longer than max_length = "
                f"{self.policy.max_length}, or than the tokenizer allows, and lose "
                f"{lost}; `truncated` logs the share."
            )
        return self.policy.scores(inputs)[index]

    def on_fit_end(self) -> None:  # called also where a resumed run has nothing left to train
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir) / "reward"
        self.save(folder)
        rank_zero_info(f"reward: {folder}")

    def save(self, folder: str | Path) -> None:
        """Writes the classifier with its tokenizer; replaces ``folder``. On all ranks."""
        if (module := on_one_device(self)) is not None:
            module._write(folder)

    @rank_zero_only
    def _write(self, folder: str | Path) -> None:
        replace_folder(folder, self.policy.model, self.policy.tokenizer)


def _each_once(texts: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """The different texts, and where among them every text is: one may be chosen in many rows."""
    keys = [repr(text) for text in texts]
    once = dict(zip(keys, texts, strict=True))
    places = {key: place for place, key in enumerate(once)}
    return list(once.values()), [places[key] for key in keys]
