"""What happens after the last step may fail; the trained weights must not be lost with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clp_lightning import MOD, FrontCallback, Grid, Preference, RunCheckpoint, SamplesCallback
from clp_lightning.rewards import RewardError
from tests.runs import Perturbed, make_data, make_module, make_trainer


def fails_in_sweeps(completions: list[Any], trainer_state: Any, **columns: Any) -> list[float]:
    if trainer_state.global_step >= 2:
        raise ConnectionError("the judge is away")
    return [float(len(str(completion))) for completion in completions]


def test_training_is_saved_before_the_sweep(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    module = make_module(tiny_folder(), rewards={"kind": fails_in_sweeps})
    trainer = make_trainer(
        tmp_path,
        FrontCallback(),
        RunCheckpoint(every_n_train_steps=100, dirpath=str(tmp_path)),
        limit_val_batches=1,
        num_sanity_val_steps=0,
    )
    with pytest.raises(RewardError, match="the judge is away"):
        trainer.fit(module, make_data(tmp_path))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2


def test_every_prompt_is_answered_greedily_under_every_preference(
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    logger, data = TensorBoardLogger(tmp_path), make_data(tmp_path)
    # Far from the reference, so that answers differ; and hot, so that samples are not greedy.
    module = make_module(tiny_folder(), Perturbed, temperature=5.0)
    samples = SamplesCallback(prompts=2, grid=Grid(1, [0.0, 0.1]))
    options = {"limit_val_batches": 1, "num_sanity_val_steps": 0, "logger": logger}
    make_trainer(tmp_path, samples, **options).fit(module, data)
    batch = next(iter(data.val_dataloader()))  # type: ignore[arg-type]
    want, shown = [], capsys.readouterr().out
    for row, prompt in enumerate(batch.prompts):
        assert sum(line.strip() == prompt for line in shown.splitlines()) == 1
        for alpha in (0.0, 0.1):
            for weights, label in (([1.0, 0.0], "kind=1"), ([0.0, 1.0], "short=1")):
                asked = replace(batch.select([row]), preference=Preference.single(weights, alpha))
                greedy = replace(module.sampling, temperature=0.0)
                answer = module.engine.generate(module.policy, asked, 1, greedy).completions[0]
                want.append((prompt, label, answer))
    assert len(batch.prompts) == 2 and len(set(want)) > 4
    assert sorted(samples._rows) == sorted(want)
    logger.finalize("success")
    (text,) = EventAccumulator(logger.log_dir).Reload().Tensors("samples/text_summary")
    assert text.tensor_proto.string_val[0].decode().count("kind=1") == 4


def test_answers_are_shown(tiny_folder: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    data = make_data(tmp_path)
    data.setup()
    trainer = make_trainer(tmp_path, SamplesCallback(), limit_val_batches=1, num_sanity_val_steps=0)
    trainer.fit(make_module(tiny_folder()), data.train_dataloader(), [data.val_dataloader()])
    shown = capsys.readouterr().out
    assert "kind=1" in shown and "short=1" in shown


def test_a_mixture_cannot_be_trained(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    module = make_module(tiny_folder(), engine=MOD())
    with pytest.raises(ValueError, match="MOD samples from a mixture"):
        make_trainer(tmp_path).fit(module, make_data(tmp_path))
    assert not module.policy.is_built
