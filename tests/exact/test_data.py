from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clp_lightning.exact import ExactDataModule, ExactReward, ExactTask

TASK = ExactTask(num_contexts=3)


def test_a_pass_holds_every_context_equally_often(tmp_path: Path) -> None:
    data = ExactDataModule(TASK, str(tmp_path / "base"), copies=4, batch_size=6, seed=0)
    data.setup()
    batches = list(data.train_dataloader())
    assert [len(batch) for batch in batches] == [6, 6]
    contexts = [x for batch in batches for x in batch.columns["context"]]
    assert sorted(contexts) == [0] * 4 + [1] * 4 + [2] * 4
    assert contexts != [0, 1, 2] * 4
    assert [p for batch in batches for p in batch.prompts] == [TASK.prompts[x] for x in contexts]
    # Copies are prompts of their own, else all of them would draw the same responses.
    assert len(torch.cat([batch.prompt_ids for batch in batches]).unique()) == 12


def test_evaluation_sees_every_context_once(tmp_path: Path) -> None:
    data = ExactDataModule(TASK, str(tmp_path / "base"), copies=4, batch_size=2)
    data.setup()
    (batch,) = data.val_dataloader()
    assert batch.columns["context"] == batch.prompt_ids.tolist() == [0, 1, 2]


def test_prepare_data_builds_the_base(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "base"
    ExactDataModule(ExactTask(num_contexts=1), str(folder)).prepare_data()
    assert (folder / "model.safetensors").is_file()


def test_copies_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="copies"):
        ExactDataModule(TASK, str(tmp_path), copies=0)


@pytest.mark.parametrize("stop", [False, True])
def test_reward_is_the_table(stop: bool) -> None:
    task = ExactTask(stop=stop)
    ids = [[1, 2, 3, 0], [5]] if stop else [[1, 2, 3, 0], [5, 5, 5, 5]]
    got = ExactReward(task, 1)(
        prompts=[task.prompts[7], task.prompts[0]],
        completions=["b c d a", ""],
        completion_ids=ids,
        context=[7, 0],
        trainer_state=None,
    )
    rows = [task.response_index[tuple(row)] for row in ids]
    assert got == [task.rewards[7, rows[0], 1].item(), task.rewards[0, rows[1], 1].item()]


def test_reward_refuses_the_prompts_of_another_task() -> None:
    with pytest.raises(ValueError, match="the same one"):
        ExactReward(TASK, 0)(["x y"], ["a a a a"], completion_ids=[[0] * 4], context=[0])


def test_reward_index_is_checked() -> None:
    with pytest.raises(ValueError, match=r"0\.\.1, not 2"):
        ExactReward(TASK, 2)
