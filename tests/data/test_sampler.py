"""The order of batches, their deal to processes, and exact resumes through Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from lightning.pytorch import Callback, LightningModule, Trainer

from clp_lightning.data import BatchKey, PromptDataModule, PromptSampler
from clp_lightning.data.sampler import by_length, deal, row_order

Seen = list[tuple[int, int, list[int]]]


class Recorder(LightningModule):
    """Notes epoch, part and prompt ids of every training batch."""

    def __init__(self, rollout_batches: int = 1) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.rollout_batches = rollout_batches
        self.seen: Seen = []
        self.validated: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen.append((batch.epoch, batch.part, batch.prompt_ids.tolist()))
        return self.weight * 1.0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert batch.epoch == 0
        self.validated += batch.prompt_ids.tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAll(Callback):
    """A checkpoint at every hook where one can be asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.taken: dict[str, int] = {}

    def _save(self, trainer: Trainer, module: Recorder, hook: str) -> None:
        if trainer.sanity_checking:
            return
        name = f"{hook}-{len(module.seen)}"
        trainer.save_checkpoint(self.folder / f"{name}.ckpt")
        self.taken[name] = len(module.seen)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self._save(trainer, pl_module, "batch")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._save(trainer, pl_module, "epoch")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._save(trainer, pl_module, "validation")


def fit(
    folder: Path,
    resume: str | None = None,
    num_workers: int = 0,
    rollout_batches: int = 1,
    callbacks: list[Callback] | None = None,
    epochs: int = 3,
    **trainer_args: Any,
) -> Recorder:
    data = PromptDataModule(
        Dataset.from_dict({"prompt": [f"prompt {i}" for i in range(17)]}),
        holdout=4,
        batch_size=3,
        num_workers=num_workers,
        seed=5,
    )
    module = Recorder(rollout_batches)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **trainer_args,
    )
    path = None if resume is None else folder / f"{resume}.ckpt"
    trainer.fit(module, data, ckpt_path=path, weights_only=True)
    return module


SCENES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 3},
    "validation in mid-epoch": {"val_check_interval": 2},
    "no validation": {"limit_val_batches": 0},
    "short epochs": {"limit_train_batches": 3},
    "a share of the epoch": {"limit_train_batches": 0.5},
    "reloaded loaders": {"reload_dataloaders_every_n_epochs": 1},
    "rollout batches": {"rollout_batches": 2, "accumulate_grad_batches": 2},
}


@pytest.mark.parametrize("scene", SCENES)
def test_resume_continues_as_the_same_run_did(tmp_path: Path, scene: str) -> None:
    options = SCENES[scene]
    saver = SaveAll(tmp_path)
    whole = fit(tmp_path, callbacks=[saver], **options)
    epochs = [epoch for epoch, _, _ in whole.seen]
    assert epochs == sorted(epochs)
    assert set(epochs) == {0, 1, 2}
    assert len(saver.taken) > 6
    for name, taken in saver.taken.items():
        rest = fit(tmp_path, resume=name, **options)
        assert rest.seen == whole.seen[taken:], name


@pytest.mark.parametrize("name", ["batch-2", "batch-4", "epoch-4", "batch-7"])
def test_resume_with_workers_even_other_workers(tmp_path: Path, name: str) -> None:
    saver = SaveAll(tmp_path)
    whole = fit(tmp_path, num_workers=2, callbacks=[saver])
    assert whole.seen == fit(tmp_path).seen
    for num_workers in (2, 0):
        rest = fit(tmp_path, resume=name, num_workers=num_workers)
        assert rest.seen == whole.seen[saver.taken[name] :]


def test_resume_of_a_resume(tmp_path: Path) -> None:
    whole = fit(tmp_path)
    fit(tmp_path, callbacks=[SaveAll(tmp_path)], epochs=1)
    fit(tmp_path, resume="epoch-4", callbacks=[SaveAll(tmp_path)], epochs=2)
    assert fit(tmp_path, resume="batch-3").seen == whole.seen[7:]


def test_second_fit_of_a_trainer_goes_on(tmp_path: Path) -> None:
    data = PromptDataModule(
        Dataset.from_dict({"prompt": list("abcdefgh")}), holdout=0, batch_size=4, num_workers=2
    )
    module = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, data)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, data)
    assert [epoch for epoch, _, _ in module.seen] == [0, 0, 1, 1, 2, 2]


def test_every_epoch_has_every_full_batch_once_in_another_order(tmp_path: Path) -> None:
    module = fit(tmp_path, epochs=2)
    first, second = (
        [i for e, _, ids in module.seen if e == epoch for i in ids] for epoch in (0, 1)
    )
    assert len(first) == len(set(first)) == 12  # 13 prompts, batches of 3
    assert first != second
    assert not set(first + second) & set(module.validated)
    assert len(set(module.validated)) == 4


def test_parts_repeat_a_generation_batch(tmp_path: Path) -> None:
    module = fit(tmp_path, rollout_batches=2, epochs=1)
    assert [part for _, part, _ in module.seen] == [0, 1, 0, 1]
    assert module.seen[0][2] == module.seen[1][2]
    assert len(module.seen[0][2]) == 6  # both slices of three


def test_batch_k_goes_to_process_k_modulo_world() -> None:
    # 7 batches of 2: two ranks get 0 2 4 and 1 3 5 in training, the odd one is left out.
    assert deal(range(15), 2, rank=0, world_size=2, drop_last=True) == [(0, 1), (4, 5), (8, 9)]
    assert deal(range(15), 2, rank=1, world_size=2, drop_last=True) == [(2, 3), (6, 7), (10, 11)]
    # In evaluation nothing is left out; batch 0 comes again for the last process.
    assert deal(range(5), 2, rank=2, world_size=4, drop_last=False) == [(4,)]
    assert deal(range(5), 2, rank=3, world_size=4, drop_last=False) == [(0, 1)]


def test_the_batches_do_not_depend_on_the_number_of_processes() -> None:
    def keys(rank: int, world_size: int) -> list[BatchKey]:
        return PromptSampler(12, 2, seed=1, rank=rank, world_size=world_size).keys(4)

    one, two = keys(0, 1), [keys(rank, 2) for rank in range(2)]
    assert one == [key for pair in zip(*two, strict=True) for key in pair]


def test_order_depends_on_seed_and_epoch() -> None:
    orders = {tuple(row_order(9, seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    assert all(sorted(order) == list(range(9)) for order in orders)


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"7 prompts cannot fill .* \(8 in all\)"):
        PromptSampler(7, 2, parts=2, world_size=2)


def test_resuming_with_other_batches_is_told() -> None:
    state = PromptSampler(12, 2).state_dict()
    with pytest.warns(UserWarning, match="had 6 batches in a pass, now there are 4"):
        PromptSampler(12, 3).load_state_dict(state)


def left(rank: int, world_size: int, state: dict[str, int]) -> list[BatchKey]:
    sampler = PromptSampler(24, 2, seed=1, parts=2, rank=rank, world_size=world_size)
    sampler.load_state_dict(state)
    return list(sampler)


@pytest.mark.parametrize(("before", "after", "taken"), [(1, 2, 8), (2, 1, 4), (3, 2, 4), (2, 3, 6)])
def test_another_number_of_processes_goes_on_with_what_is_left(
    before: int, after: int, taken: int
) -> None:
    sampler = PromptSampler(24, 2, seed=1, parts=2, rank=0, world_size=before)
    sampler.position = taken
    shares = [left(rank, after, sampler.state_dict()) for rank in range(after)]
    dealt = [key.rows for share in shares for key in share if key.part == 0]
    done = taken // 2 * before
    assert sorted(dealt) == sorted(
        key.rows for key in left(0, 1, state_at(2 * done)) if not key.part
    )


def state_at(position: int) -> dict[str, int]:
    sampler = PromptSampler(24, 2, seed=1, parts=2)
    sampler.position = position
    return sampler.state_dict()


def test_processes_that_cannot_share_what_was_taken_are_told() -> None:
    with pytest.warns(UserWarning, match="had taken 3 batches; 2 processes cannot share"):
        assert len(left(0, 2, state_at(6))) == 2 * 1


def test_batches_of_like_length_hold_every_row_once() -> None:
    lengths = torch.randint(1, 100, (133,), generator=torch.Generator().manual_seed(0)).tolist()
    passes = []
    for epoch in (0, 1):
        order = row_order(133, seed=3, epoch=epoch)
        found = by_length(order, lengths, 4, seed=3, epoch=epoch)
        assert sorted(found) == list(range(133)) and found[132:] == order[132:]
        padded = [
            sum(max(lengths[row] for row in rows) * len(rows) for rows in batches)
            for batches in (
                deal(each, 4, rank=0, world_size=1, drop_last=True) for each in (order, found)
            )
        ]
        assert padded[1] < sum(lengths) + 0.25 * (padded[0] - sum(lengths))
        longest = [max(lengths[row] for row in found[i : i + 4]) for i in range(0, 132, 4)]
        assert longest != sorted(longest)  # batches are in no order
        passes.append(found)
    assert passes[0] != passes[1]


@pytest.mark.parametrize("world_size", [1, 2])
def test_group_by_length_reaches_the_sampler(world_size: int) -> None:
    rows = Dataset.from_list([{"prompt": "x" * (7 * i % 40 + 1)} for i in range(40)])
    data = PromptDataModule(rows, holdout=0, batch_size=4, seed=0, group_by_length=True)
    data.setup("fit")
    keys = PromptSampler(40, 4, seed=0, lengths=[7 * i % 40 + 1 for i in range(40)]).keys(0)
    batches = list(data.train_dataloader())
    assert [batch.prompt_ids.tolist() for batch in batches] == [list(key.rows) for key in keys]
    parts = [
        PromptSampler(
            40,
            4,
            seed=0,
            lengths=[7 * i % 40 + 1 for i in range(40)],
            rank=rank,
            world_size=world_size,
        ).keys(0)
        for rank in range(world_size)
    ]
    together = [key for several in zip(*parts, strict=True) for key in several]
    assert together == keys  # alike on any number of processes
