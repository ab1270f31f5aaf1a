"""PromptDataModule on every kind of source, with and without a Trainer."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer

from clp_lightning.data import Docstrings, PromptDataModule

ROWS = [{"prompt": f"prompt {i}", "level": i} for i in range(10)]


def ready(**options: Any) -> PromptDataModule:
    data = PromptDataModule(**({"source": Dataset.from_list(ROWS), "batch_size": 2} | options))
    data.prepare_data()
    data.setup()
    return data


def ids(loader: Any) -> list[int]:
    return [i for batch in loader for i in batch.prompt_ids.tolist()]


def write(folder: Path, kind: str) -> str:
    rows = Dataset.from_list(ROWS)
    path = folder / f"rows.{kind}"
    if kind in ("jsonl", "json"):
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif kind == "csv":
        rows.to_csv(path)
    elif kind == "parquet":
        rows.to_parquet(path)
    elif kind == "saved":
        rows.save_to_disk(path)
    elif kind == "splits":
        DatasetDict({"train": rows, "test": rows.select(range(3))}).save_to_disk(path)
    else:
        path.mkdir()
        rows.to_parquet(path / "train.parquet")
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "saved", "splits", "folder"])
def test_sources(tmp_path: Path, kind: str) -> None:
    data = ready(source=write(tmp_path, kind), holdout=0)
    batches = list(data.train_dataloader())
    assert sorted(i for b in batches for i in b.prompt_ids.tolist()) == list(range(10))
    for batch in batches:
        assert batch.prompts == [f"prompt {i}" for i in batch.prompt_ids.tolist()]
        assert batch.columns == {"level": batch.prompt_ids.tolist()}
    assert data.column_names == ["level"]


@pytest.mark.parametrize("kind", ["jsonl", "splits", "frame"])
def test_sources_as_python_objects(tmp_path: Path, kind: str) -> None:
    # With an index of its own, which is no column.
    frame = pd.DataFrame(ROWS, index=range(5, 15))
    source: Any = frame if kind == "frame" else Path(write(tmp_path, kind))
    evaluation = {"eval_split": "test"} if kind == "splits" else {"eval_source": source}
    data = ready(source=source, **evaluation)
    assert sorted(ids(data.train_dataloader())) == list(range(10))
    assert ids(data.val_dataloader()) == list(range(3 if kind == "splits" else 10))
    assert data.column_names == ["level"]


def test_sources_of_no_use_are_refused_by_name() -> None:
    splits = DatasetDict({"train": Dataset.from_list(ROWS)})
    with pytest.raises(ValueError, match=r"source is a DatasetDict; .*data\['train'\]"):
        PromptDataModule(splits)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"eval_source is a list; .*from_list"):
        PromptDataModule(eval_source=ROWS)  # type: ignore[arg-type]


def test_an_empty_evaluation_source_is_not_the_training_one() -> None:
    with pytest.raises(ValueError, match="no rows"):
        ready(eval_source=Dataset.from_dict({"prompt": [], "level": []}))


def test_paths_from_home_and_suffixes_in_capitals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Path(write(tmp_path, "jsonl")).rename(tmp_path / "ROWS.JSONL")
    write(tmp_path, "folder")
    for source in ("~/ROWS.JSONL", "~/rows.folder"):
        assert len(ready(source=source, holdout=0).train_dataloader()) == 5


def test_messages_that_differ_in_their_keys(tmp_path: Path) -> None:
    first = [
        {"role": "user", "content": "Hi", "name": "Ann"},
        {"role": "assistant", "content": "!"},
    ]
    second = [{"role": "user", "content": "Ho"}, {"role": "assistant", "content": "?"}]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (first, second)))
    data = ready(source=str(path), holdout=0, seed=0)
    (batch,) = data.train_dataloader()
    order = batch.prompt_ids.tolist()
    assert batch.prompts == [[first[:1], second[:1]][i] for i in order]
    assert batch.columns == {"completion": [[first[1:], second[1:]][i] for i in order]}


def test_the_default_source_needs_nothing() -> None:
    data = PromptDataModule(batch_size=4)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert set(batch.columns) == {"document", "summary"}
    assert batch.prompts[0].endswith(batch.columns["document"][0])


def test_docstrings_for_supervised_training() -> None:
    names = {"completion": "summary", "summary": "summary"}
    data = ready(source=Docstrings(max_words=25), columns=names, limit=50, eval_prompts=2)
    batch = next(iter(data.val_dataloader()))
    assert batch.columns["completion"] == batch.columns["summary"]
    assert len(ids(data.val_dataloader())) == 2


def test_holdout_is_kept_apart_and_the_same_for_every_seed() -> None:
    one, two = ready(holdout=4, seed=1), ready(holdout=4, seed=2)
    held_out = ids(one.val_dataloader())
    assert len(held_out) == 4
    assert held_out == ids(two.val_dataloader()) == ids(one.test_dataloader())
    assert sorted(held_out + ids(one.train_dataloader())) == list(range(10))
    assert ids(one.train_dataloader()) != ids(two.train_dataloader())
    # Fewer evaluation prompts are the first of them, and train no more for it.
    fewer = ready(holdout=4, eval_prompts=2)
    assert ids(fewer.val_dataloader()) == held_out[:2]
    assert set(ids(fewer.train_dataloader())).isdisjoint(held_out)
    assert len(ids(ready(holdout=0.3).val_dataloader())) == 3
    assert len(ids(ready().val_dataloader())) == 1  # a twentieth, at least one


def test_own_evaluation_prompts(tmp_path: Path) -> None:
    data = ready(source=write(tmp_path, "splits"), eval_split="test", eval_batch_size=3)
    assert sorted(ids(data.train_dataloader())) == list(range(10))
    assert [len(batch) for batch in data.predict_dataloader()] == [3]
    other = Dataset.from_list([{"prompt": "other"}])
    data = ready(eval_source=other)
    assert next(iter(data.val_dataloader())).prompts == ["other"]


def test_without_evaluation_prompts() -> None:
    data = ready(holdout=0)
    data.setup("fit")
    assert data.val_dataloader() == []
    data.setup("validate")
    for loader in (data.val_dataloader, data.test_dataloader):
        with pytest.raises(ValueError, match="no prompts to evaluate on: set holdout"):
            loader()


def test_seed_of_the_run_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    assert ids(ready(holdout=0).train_dataloader()) == ids(
        ready(seed=3, holdout=0).train_dataloader()
    )


def test_statistics_batches_are_the_first_of_the_first_pass() -> None:
    data = ready(holdout=0, batch_size=3)
    order = ids(data.train_dataloader())
    loader = data.train_dataloader()
    iter(loader).__next__()
    assert ids(data.statistics_batches(7)) == order[:7]
    assert ids(data.statistics_batches(2)) == order[:2]
    assert len(ids(data.statistics_batches(100))) == 10
    assert loader.state_dict() == {"epoch": 0, "position": 1, "length": 3, "processes": 1}


def test_processes_share_the_statistics_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    data = ready(holdout=0)
    whole = list(data.statistics_batches(8))
    dealt = []
    for rank in range(2):
        place = SimpleNamespace(distributed_sampler_kwargs={"rank": rank, "num_replicas": 2})
        monkeypatch.setattr(data, "trainer", place)
        dealt.append([b.prompt_ids.tolist() for b in data.statistics_batches(8)])
    assert dealt == [[whole[i + r].prompt_ids.tolist() for i in (0, 2)] for r in range(2)]


def test_overfit_batches_are_refused() -> None:
    class Nothing(LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> None: ...

        def configure_optimizers(self) -> None: ...

    trainer = Trainer(overfit_batches=1, accelerator="cpu", logger=False, max_epochs=1)
    with pytest.raises(ValueError, match="use limit=N instead"):
        trainer.fit(Nothing(), ready())


def test_lightning_leaves_the_loaders_alone_under_ddp() -> None:
    trainer = Trainer(strategy="ddp", devices=2, accelerator="cpu", logger=False)
    data = ready()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert not trainer._data_connector._requires_distributed_sampler(loader)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"eval_prompts": 0}, "eval_prompts must be at least 1"),
        ({"holdout": 1.5}, "a share below 1, not 1.5"),
        ({"holdout": -1}, "not -1"),
        ({"holdout": 3, "eval_source": "x.jsonl"}, "not both"),
        ({"eval_split": "test"}, "another split of a folder or hub data set"),
        ({"source": "rows.jsonl", "eval_split": "test"}, "another split"),
        ({"source": "some/name", "eval_split": "train"}, "another split"),
    ],
)
def test_bad_arguments_are_refused_in_the_constructor(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PromptDataModule(**options)


def test_bad_data_is_refused_in_setup(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Dataset .* has no rows"):
        ready(source=Dataset.from_dict({"prompt": []}))
    with pytest.raises(ValueError, match="holdout 10 leaves nothing of 10 rows"):
        ready(holdout=10)
    with pytest.raises(ValueError, match="Row 1 has an empty prompt"):
        ready(source=Dataset.from_dict({"prompt": ["a", " ", "b"]}))
    with pytest.raises(ValueError, match="reserved name"):
        ready(source=Dataset.from_dict({"prompt": ["a"], "weights": [1]}))
    with pytest.raises(ValueError, match=r"names \['body'\]; the data has: level, prompt"):
        ready(columns={"text": "body"})
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl' does not exist"):
        ready(source=str(tmp_path / "missing.jsonl"))
    for name in ("a.jsonl", "c.csv"):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=rf"{name}' is empty"):
            ready(source=str(tmp_path / name))
    (tmp_path / "rows.txt").write_text("a prompt")
    with pytest.raises(ValueError, match=r"unknown kind '\.txt'; give one of \.jsonl, \.json, "):
        ready(source=str(tmp_path / "rows.txt"))
    for name, text in [("b.csv", "prompt\n"), ("d.jsonl", "{x}")]:
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{name}' has no rows or is not valid (json|csv): "):
            ready(source=str(tmp_path / name))
    with pytest.raises(ValueError, match=r"has no split 'dev', only \['test', 'train'\]"):
        ready(source=write(tmp_path, "splits"), split="dev")
    with pytest.raises(ValueError, match="Cannot load the data set 'no/such_name'"):
        ready(source="no/such_name")
    with pytest.raises(ValueError, match="10 prompts cannot fill one batch of 16"):
        ready(batch_size=16, holdout=0).train_dataloader()
    with pytest.raises(RuntimeError, match="Call setup"):
        PromptDataModule().train_dataloader()


def test_arguments_from_the_command_line() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(PromptDataModule, "data")
    config = parser.parse_args(
        [
            "--data.source=clp_lightning.data.Docstrings",
            "--data.source.init_args.max_words=45",
            "--data.holdout=96",
            "--data.columns={completion: summary}",
        ]
    )
    data = parser.instantiate(config).data
    assert isinstance(data.source, Docstrings)
    assert (data.source.max_words, data.holdout) == (45, 96)
    plain = parser.instantiate(parser.parse_args(["--data.source=rows.jsonl"])).data
    assert plain.source == "rows.jsonl"


def test_batches_reach_the_device_hook_unharmed() -> None:
    batch = next(iter(ready().train_dataloader()))
    assert batch.to(torch.device("cpu")) is batch
