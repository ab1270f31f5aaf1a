from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader

from clp_lightning.callbacks.front import FrontCallback
from clp_lightning.metrics import Front, Grid

NAMES = ["support", "brevity"]
SMALL, FULL = Grid(divisions=1), Grid(divisions=4, alphas=[0.1, 0.3])


class Module(pl.LightningModule):
    """One number is trained; its front follows the weights."""

    seed = 11
    trained_steps = 0
    decoding: dict[str, Any] = {"temperature": 1.0}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.full_grid = False
        self.seen: list[tuple[bool, int]] = []

    def cost_report(self) -> dict[str, Any]:
        return {"optimizer_steps": 4}

    def base_identity(self) -> dict[str, Any]:
        return {"name": "none", "revision": None, "fingerprint": "0"}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.weight * batch.float()).mean()

    def on_validation_epoch_start(self) -> None:
        in_fit = self.trainer.state.fn == "fit" and not self.full_grid
        grid = SMALL if in_fit else FULL
        self.front = Front(NAMES, grid.preferences(NAMES))

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        assert not self.training
        grid = self.front.grid
        for point in range(-1, len(grid)):
            rewards = batch[:, None] * 0.1 + (grid.weights[point] if point >= 0 else 0)
            self.front.update(
                point=torch.full_like(batch, point),
                prompt_ids=batch,
                sample=torch.zeros_like(batch),
                rewards=rewards.expand(-1, 2),
                normalized=rewards.expand(-1, 2),
                log_ratio=torch.full_like(batch, float(point >= 0), dtype=torch.float),
                length=torch.full_like(batch, 7),
                truncated=torch.zeros_like(batch, dtype=torch.bool),
            )

    def on_validation_epoch_end(self) -> None:
        self.front_report = self.front.compute()
        self.seen.append((self.full_grid, len(self.front.grid)))
        for name, value in self.front_report.scalars().items():
            self.log(f"val/{name}", value)

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step

    def on_test_epoch_end(self) -> None:
        self.front_report = self.front.compute()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader() -> DataLoader[Any]:
    return DataLoader(torch.arange(6), batch_size=4)  # type: ignore[arg-type]


def trainer(folder: Path, *callbacks: pl.Callback, **arguments: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "logger": TensorBoardLogger(folder),
    }
    return pl.Trainer(callbacks=[FrontCallback(), *callbacks], **defaults | arguments)


def test_fit_measures_small_grids_then_the_full_one_and_prints_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, run = Module(), trainer(tmp_path, TQDMProgressBar(), enable_progress_bar=True)
    run.fit(module, loader(), loader())
    # The sanity check, two epochs, and the sweep.
    assert module.seen == [(False, 2), (False, 2), (False, 2), (True, 10)]
    assert not module.full_grid and run.state.fn == "fit"

    folder = Path(str(run.log_dir))
    assert {path.name for path in folder.iterdir() if "front" in path.name} == {
        "front.json",
        "front_samples.parquet",
        "front.csv",
        "front.png",
    }
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("front:")] == [f"front: {folder}/front.json"]
    assert lines[-1].startswith("front:")
    assert any("reference" in line for line in lines)
    assert any("0.25 / 0.75" in line for line in lines)

    front = json.loads((folder / "front.json").read_text())
    assert list(front)[:4] == ["schema", "stage", "checkpoint", "global_step"]
    assert list(front)[4:7] == ["seed", "decoding", "rewards"]
    assert front["base"]["fingerprint"] == "0"
    assert (front["seed"], front["decoding"]) == (11, {"temperature": 1.0})
    assert len(front["points"]) == 10 and front["cost"] == {"optimizer_steps": 4}
    assert "closed_gap" not in front["metrics"]

    # self.log works inside the sweep, and reaches the logger at the last step.
    assert run.callback_metrics["val/value"] == module.front_report.scalars()["value"]
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Scalars("val/value")] == [1, 3, 4]
    assert len(events.Images("front")) == 3


def test_a_resumed_fit_measures_the_policy_in_memory(tmp_path: Path) -> None:
    first = trainer(tmp_path, logger=False, default_root_dir=tmp_path, max_epochs=1)
    first.fit(Module(), loader(), loader())
    path = tmp_path / "resumed.ckpt"
    first.save_checkpoint(path)
    run = trainer(tmp_path, logger=False, default_root_dir=tmp_path, max_epochs=2)
    run.fit(Module(), loader(), loader(), ckpt_path=path)
    front = json.loads((tmp_path / "front.json").read_text())
    assert (front["stage"], front["checkpoint"]) == ("validate", None)
    run.test(Module(), loader(), ckpt_path=path, verbose=False)
    front = json.loads((tmp_path / "front.json").read_text())
    assert (front["stage"], front["checkpoint"]) == ("test", str(path))


def test_the_files_say_the_same(tmp_path: Path) -> None:
    run, module = trainer(tmp_path), Module()
    run.validate(module, loader(), verbose=False)
    folder = Path(str(run.log_dir))
    front = json.loads((folder / "front.json").read_text())
    table = pd.read_csv(folder / "front.csv")
    assert list(table)[:4] == ["point", "weight/support", "weight/brevity", "alpha"]
    assert table["point"].tolist() == list(range(-1, 10))
    assert table["value"][1:].tolist() == [point["value"] for point in front["points"]]

    samples = pd.read_parquet(folder / "front_samples.parquet")
    assert samples.dtypes.astype(str).to_dict() == {
        "prompt_id": "int64",
        "point": "int32",
        "sample": "int32",
        "reward/support": "float32",
        "reward/brevity": "float32",
        "normalized/support": "float32",
        "normalized/brevity": "float32",
        "log_ratio": "float32",
        "length": "int64",
        "truncated": "bool",
    }
    assert len(samples) == 6 * 11
    means = samples[samples["point"] == 3].mean()
    assert means["reward/support"] == pytest.approx(front["points"][3]["rewards"]["support"])


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_validate_and_test_print_once(
    stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trainer(tmp_path, RichProgressBar(), enable_progress_bar=True, logger=CSVLogger(tmp_path))
    getattr(run, stage)(Module(), loader())
    out = capsys.readouterr().out
    assert (
        out.count("front: ") == 1
        and out.rstrip().splitlines()[-1] == f"front: {run.log_dir}/front.json"
    )


def test_without_a_logger_the_root_folder_is_used(tmp_path: Path) -> None:
    trainer(tmp_path, logger=False, default_root_dir=tmp_path).test(Module(), loader())
    assert (tmp_path / "front.json").exists()


def test_without_validation_data_nothing_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, run = Module(), trainer(tmp_path)
    run.fit(module, loader())
    assert module.seen == []
    assert "front:" not in capsys.readouterr().out


def test_the_sweep_leaves_checkpoints_alone(tmp_path: Path) -> None:
    # The last step is no multiple of the validation interval, and nothing was saved at it yet.
    def run(folder: Path, *callbacks: pl.Callback) -> tuple[pl.Trainer, ModelCheckpoint]:
        checkpoint = ModelCheckpoint(
            dirpath=folder, monitor="val/value", save_top_k=-1, save_last=True, mode="max"
        )
        stopping = EarlyStopping("val/value", mode="max", patience=9)
        made = pl.Trainer(
            callbacks=[*callbacks, stopping, checkpoint],
            max_epochs=3,
            check_val_every_n_epoch=2,
            logger=CSVLogger(folder),
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
        )
        made.fit(Module(), loader(), loader())
        return made, checkpoint

    _, plain = run(tmp_path / "plain")
    _, swept = run(tmp_path / "swept", FrontCallback())
    saved = [sorted(Path(c.dirpath or "").glob("*.ckpt")) for c in (plain, swept)]
    assert [path.name for path in saved[0]] == [path.name for path in saved[1]]
    assert plain.best_model_score == swept.best_model_score
    for one, two in zip(*saved, strict=True):
        loops = [torch.load(path, weights_only=False)["loops"] for path in (one, two)]
        assert loops[0] == loops[1]


def test_extra_metrics_are_merged(tmp_path: Path) -> None:
    class Exact(FrontCallback):
        def extra_metrics(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule
        ) -> dict[str, Any]:
            return {"closed_gap": {"mean": 0.99, "min": 0.98}}

    run = pl.Trainer(callbacks=[Exact()], logger=CSVLogger(tmp_path), enable_progress_bar=False)
    run.validate(Module(), loader(), verbose=False)
    front = json.loads((Path(str(run.log_dir)) / "front.json").read_text())
    assert front["metrics"]["closed_gap"] == {"mean": 0.99, "min": 0.98}
    assert "value_gain" in front["metrics"]


def test_without_matplotlib_there_is_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return real(name, *args, **kwargs)

    run = trainer(tmp_path, logger=CSVLogger(tmp_path))
    monkeypatch.setattr(builtins, "__import__", refuse)
    with caplog.at_level("INFO"):
        run.validate(Module(), loader(), verbose=False)
    assert 'pip install "clp_lightning[plots]"' in caplog.text
    folder = Path(str(run.log_dir))
    assert (folder / "front.json").exists() and not (folder / "front.png").exists()


def test_a_module_without_a_front_is_named(tmp_path: Path) -> None:
    class Plain(pl.LightningModule):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None: ...

    with pytest.raises(RuntimeError, match="Plain must set `front_report`"):
        trainer(tmp_path).validate(Plain(), loader())


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path, logger=False, default_root_dir=tmp_path)
    run.validate(Module(), loader(), verbose=False)
    before = (tmp_path / "front.csv").read_bytes()

    def fail(self: pd.DataFrame, path: Path, **kwargs: Any) -> None:
        Path(path).write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(pd.DataFrame, "to_csv", fail)
    with pytest.raises(OSError, match="disk full"):
        run.validate(Module(), loader(), verbose=False)
    assert (tmp_path / "front.csv").read_bytes() == before
    assert not list(tmp_path.glob(".front*"))
