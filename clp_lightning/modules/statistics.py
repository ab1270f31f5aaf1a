"""Mean and deviation of the rewards on reference responses, measured once and then frozen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..types import Preference, PromptBatch
from .stop import ask_rewards, gather, raise_together

if TYPE_CHECKING:
    from .clp import CLPModule

__all__ = ["check_sizes", "fit_statistics"]

# Epochs that no training pass reaches: the draws of statistics and fronts are their own.
STATISTICS_EPOCH = 2**31
EVALUATION_EPOCH = 2**31 + 1


def uniform_preference(rows: int, num_rewards: int) -> Preference:
    """A placeholder for rollouts of the reference, which no preference changes."""
    return Preference(torch.full((rows, num_rewards), 1 / num_rewards), torch.ones(rows))


def check_sizes(prompts: int, samples: int) -> None:
    """Refuses what ``fit_statistics`` cannot be given."""
    if prompts < 0 or (prompts and samples < 1):
        raise ValueError(
            "statistics_prompts must be 0 (leaves the rewards as they are) or more and "
            f"statistics_samples must be at least 1; got {prompts} and {samples}."
        )


def fit_statistics(module: CLPModule, prompts: int, samples: int) -> None:
    """Fits ``module.rewards`` to reference responses, unless it is fitted already.

    Args:
        module: Its trainer is set up.
        prompts: Number of prompts over all ranks; 0 leaves the rewards as they are.
        samples: Responses to each.
    """
    if module.rewards.fitted:
        return
    if prompts == 0:
        module.rewards.leave_raw()
        return
    found, dropped = [], 0
    with module.policy.reference():
        for batch in _batches(module, prompts):
            preference = uniform_preference(len(batch), len(module.rewards.names))
            batch = replace(batch, preference=preference.to(module.device))
            rollout = module.engine.generate(module.policy, batch, samples, module.sampling)
            keys = torch.stack([rollout.prompt_ids.cpu(), rollout.sample.cpu()], dim=1)
            scores = ask_rewards(module, rollout)
            found.append((keys, scores.raw.cpu()))
            dropped += int((~scores.kept).sum())
    raise_together(module)
    if not found:
        raise ValueError(
            "There is no prompt to measure the rewards' statistics on: give the data set more "
            "rows, a smaller holdout, or set statistics_prompts=0."
        )
    parts = gather(module.trainer, (found, dropped))
    keys, raw = map(torch.cat, zip(*(pair for part in parts for pair in part[0]), strict=True))
    lost, sampled = sum(part[1] for part in parts), len(raw)
    if lost > module.drop_limit.share * sampled:
        what = f"Before training: {lost} of {sampled} responses of the reference"
        raise module.drop_limit.error(module, what)
    module.rewards.fit(_each_once(keys, raw))


def _each_once(keys: Tensor, raw: Tensor) -> Tensor:
    """The scores of every response once, in an order that does not depend on the ranks."""
    unique, group = torch.unique(keys, dim=0, return_inverse=True)
    first = torch.full((len(unique),), len(keys))
    return raw[first.scatter_reduce(0, group, torch.arange(len(keys)), "amin")]


def _batches(module: CLPModule, prompts: int) -> Iterator[PromptBatch]:
    """Training prompts of this rank, without moving the training loader's position."""
    trainer = module.trainer
    data: Any = getattr(trainer, "datamodule", None)
    if hasattr(data, "statistics_batches"):
        # It deals the prompts to the ranks itself.
        return _first(data.statistics_batches(prompts), prompts)
    source = trainer.fit_loop._data_source if trainer.training else None
    loader: Any = source.instance if source is not None else None
    if loader is None:
        loaders = trainer.val_dataloaders or trainer.test_dataloaders
        loader = loaders[0] if isinstance(loaders, list) else loaders
    if hasattr(loader, "train_dataloader"):
        loader = loader.train_dataloader()
    if loader is None or not hasattr(loader, "__iter__"):
        raise ValueError(
            "There are no prompts to measure the rewards' statistics on. Load a trained "
            "checkpoint, pass a PromptDataModule, or set statistics_prompts=0."
        )
    return _first(loader, -(-prompts // trainer.world_size))


def _first(batches: Iterable[PromptBatch], prompts: int) -> Iterator[PromptBatch]:
    """Batches of ``prompts`` prompts in all, ready for the reference to answer."""
    left = prompts
    for batch in batches:
        if left <= 0:
            return
        batch = PromptBatch.check(batch)
        if batch.part:
            continue  # the same prompts once more, for another slice
        batch = batch.select(range(min(left, len(batch))))
        left -= len(batch)
        yield replace(batch, epoch=STATISTICS_EPOCH, parts=1, part=0)
