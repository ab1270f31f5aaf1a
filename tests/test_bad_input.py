"""Mistakes of a user, through the whole library: one clear error, as early as it can be known.

What each part refuses by itself is tested beside that part.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader

from clp_lightning import CLPCallback, Fixed, FixedAlpha, Grid, LoRA, Preference, Support
from clp_lightning.callbacks import WeightSampler
from clp_lightning.rewards import RewardError
from tests.runs import kind, make_data, make_module, make_trainer


class Thirds(WeightSampler):
    def sample(self, names: Sequence[str], generator: Generator) -> Tensor:
        return torch.ones(3) / 3


class Ones(WeightSampler):
    def sample(self, names: Sequence[str], generator: Generator) -> Tensor:
        return torch.ones(len(names))


def needs_document(completions: list[str], document: list[str], **_: Any) -> list[float]:
    return [0.0 for _ in completions]


def not_a_number(completions: list[str], **_: Any) -> list[float]:
    return [float("nan") for _ in completions]


def rows(**columns: list[Any]) -> Callable[[Path], None]:
    """Replaces the run's data by these columns."""

    def write(folder: Path) -> None:
        table = [
            dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
        ]
        text = "".join(json.dumps(row) + "\n" for row in table)
        (folder / "rows.jsonl").write_text(text)

    return write


TEN = [f"tea {i}" for i in range(10)]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"weights": Fixed({"kind": 0.5, "shrt": 0.5})}, "unknown reward 'shrt'; .* kind, short"),
        ({"weights": Fixed({"kind": 1.0})}, "No weight for reward 'short'"),
        ({"weights": Fixed({"kind": 0.5, "short": 0.6})}, "must sum to 1, they sum to 1.1"),
        ({"weights": Fixed({"kind": 1.5, "short": -0.5})}, "weight of 'short' must be 0 or more"),
        (
            {"weights": Thirds()},
            r"Thirds.sample returned shape \(3,\).*\['kind', 'short'\]: \(2,\)",
        ),
        ({"weights": Ones()}, "must sum to 1, they sum to 2"),
        ({"module": {"grid": Grid(weights=[{"kind": 1.0, "lenth": 0.0}])}}, "reward 'lenth'"),
        ({"module": {"small_grid": Grid(weights=[{"kind": 0.4, "short": 0.4}])}}, "sum to 0.8"),
        ({"module": {"rewards": {"kind": "tests.runs.knd"}}}, "tests.runs has no 'knd'"),
        (
            {"module": {"rewards": {"kind": kind, "doc": needs_document}}},
            r"Reward 'doc' needs the columns \['document'\]; the data has: answer, topic",
        ),
        (
            {"module": {"rewards": {"kind": kind, "support": Support()}}},
            r"Reward 'support' needs the columns \['document'\]",
        ),
        ({"data": {"columns": {"document": "body"}}}, r"columns names \['body'\]; the data has: "),
        ({"data": {"source": "nowhere.jsonl"}}, "'nowhere.jsonl' does not exist"),
        ({"data": {"batch_size": 17}}, "16 prompts cannot fill one batch of 17 prompts"),
        (
            {"data": {"batch_size": 9}, "module": {"rollout_batches": 2}, "accumulate": 2},
            "16 prompts cannot fill one batch of 9 prompts x 2 rollout batches",
        ),
        ({"data": {"seed": -1}}, "seed must be 0 or more; got -1"),
        ({"module": {"seed": -1}}, "seed must be 0 or more; got -1"),
        ({"module": {"rewards": [kind]}}, "rewards is a list; name each reward: rewards={"),
        ({"module": {"conditioner": LoRA}}, r"conditioner is <class .*LoRA'>; give a Conditioner"),
        ({"rows": rows(prompt=[])}, r"rows.jsonl' is empty"),
        ({"rows": rows(prompt=[*TEN, "  "])}, "Row 10 has an empty prompt"),
        ({"rows": rows(document=TEN)}, "No column is called prompt.*there are: document"),
        (
            {"rows": rows(prompt=TEN, trainer_state=TEN)},
            "'trainer_state'.*reserved name.*my_trainer_state",
        ),
        ({"rows": rows(prompt=TEN, alpha=TEN)}, "'alpha'.*reserved name"),
    ],
)
def test_it_is_told_before_the_model_is_loaded(
    mistake: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base = "no/such/model"  # whoever loads it first fails with another error
    with pytest.raises((ValueError, FileNotFoundError), match=message):  # noqa: PT012
        callback = CLPCallback(mistake.get("weights"), FixedAlpha(0.1))
        module = make_module(base, **mistake.get("module", {}))
        data = make_data(tmp_path, **mistake.get("data", {}))
        if "rows" in mistake:
            mistake["rows"](tmp_path)
        accumulate = mistake.get("accumulate", 1)
        make_trainer(tmp_path, callback, accumulate_grad_batches=accumulate).fit(module, data)


def test_a_model_that_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no/such/model.*was not found"):
        make_trainer(tmp_path).fit(make_module("no/such/model"), make_data(tmp_path))


def test_a_model_without_a_chat_template(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    module, data = make_module(tiny_folder()), make_data(tmp_path, conversational=True)
    with pytest.raises(ValueError, match="no chat template"):
        make_trainer(tmp_path).fit(module, data)


def test_a_model_without_a_pad_token_works(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path)
    trainer.fit(make_module(tiny_folder(pad=False)), make_data(tmp_path))
    assert trainer.global_step == 2


def test_an_overlong_prompt_is_named(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    module = make_module(tiny_folder(), max_prompt_tokens=4, on_long="error")
    with pytest.raises(ValueError, match=r"\d tokens.*max_prompt_tokens=4"):
        make_trainer(tmp_path).fit(module, make_data(tmp_path))


def test_a_faulty_reward_stops_the_run_and_is_named(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    module = make_module(tiny_folder(), rewards={"kind": kind, "nan": not_a_number})
    with pytest.raises(RewardError, match=r"Reward 'nan' returned nan.*Prompt: '.*Completion: '"):
        make_trainer(tmp_path).fit(module, make_data(tmp_path))


def test_evaluating_before_there_are_statistics(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    # predict sweeps no reference: raw rewards need no statistics.
    trainer = make_trainer(tmp_path)
    records = trainer.predict(make_module(tiny_folder()), make_data(tmp_path))
    assert records and len(records) == 2


def test_a_preference_of_the_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"weights of shape \(B, K\).*got \(2,\) and \(1,\)"):
        Preference(torch.ones(2), torch.ones(1))


@pytest.mark.parametrize("stage", ["fit", "validate", "predict"])
@pytest.mark.parametrize("statistics", [0, 4])
def test_a_loader_of_something_else(
    stage: str, statistics: int, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    rows: Any = [{"prompt": text} for text in TEN]
    module = make_module(tiny_folder(), statistics_prompts=statistics)
    trainer = make_trainer(tmp_path, limit_val_batches=None)
    with pytest.raises(TypeError, match=r"gave a dict, not a PromptBatch.*collate_fn.*collate"):
        getattr(trainer, stage)(module, DataLoader(rows, batch_size=2))
