"""What training has cost: counted in fit, kept in the checkpoint, written into front.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clp_lightning import MOD, CLPModule, DeRa, FrontCallback, LoRA, RunCheckpoint
from clp_lightning.modules.cost import Cost
from tests.runs import Recorder, make_data, make_module, make_trainer, read_lines

FRONT = {"limit_val_batches": 1.0, "num_sanity_val_steps": 0}


def cost_in(folder: Path) -> dict[str, Any]:
    cost: dict[str, Any] = json.loads((folder / "front.json").read_text())["cost"]
    return cost


def test_counts_of_a_run_and_of_its_checkpoint(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    # Two steps of two batches of two prompts, three responses each, two rewards.
    module = make_module(tiny_folder(), engine=Recorder(str(tmp_path / "record")))
    trainer = make_trainer(
        tmp_path, FrontCallback(), RunCheckpoint(), accumulate_grad_batches=2, **FRONT
    )
    trainer.fit(module, make_data(tmp_path))
    cost = cost_in(tmp_path)
    assert (cost["optimizer_steps"], cost["responses"]) == (2, 2 * 2 * 2 * 3)
    assert cost["reward_calls"] == 2 * cost["responses"]

    # A response has as many tokens as it has before its stop token (of id 1), and that one.
    training = [r for r in read_lines(tmp_path / "record") if r["epoch"] < 2**31]
    rows = [row for record in training for row in record["tokens"]]
    stop = module.policy.stop_ids[0]
    lengths = [row.index(stop) + 1 if stop in row else None for row in rows]
    known = sum(length for length in lengths if length is not None)
    cut = [len(row) for row, length in zip(rows, lengths, strict=True) if length is None]
    assert cost["sampled_tokens"] == known + sum(cut)
    assert 0 < cost["wall_s"] < 60
    trained = [p.numel() for p in module.policy.parameters() if p.requires_grad]
    assert cost["trained_parameters"] == sum(trained)
    assert (cost["models"], cost["forwards"]) == (1, 1)

    path = tmp_path / "checkpoints/last.ckpt"
    for engine, forwards in ((None, 1), (MOD(), 2), (DeRa(), 2)):
        again = make_module(tiny_folder(), engine=engine)
        make_trainer(tmp_path, FrontCallback(), **FRONT).test(
            again, make_data(tmp_path), ckpt_path=path, verbose=False
        )
        found = cost_in(tmp_path)
        assert found.pop("wall_s") == pytest.approx(cost["wall_s"], rel=0.5)
        assert found == {k: v for k, v in cost.items() if k != "wall_s"} | {"forwards": forwards}


def test_three_corners_are_three_forwards(tiny_folder: Callable[..., Path]) -> None:
    module = CLPModule(str(tiny_folder()), LoRA(), dict.fromkeys("abc", "tests.runs.kind"))
    module.configure_model()
    assert MOD().forwards(module.policy, 3) == 3
    assert DeRa().forwards(module.policy, 3) == 2


def test_slices_of_one_rollout_count_once(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    module = make_module(tiny_folder(), rollout_batches=2)
    trainer = make_trainer(tmp_path, accumulate_grad_batches=2)
    trainer.fit(module, make_data(tmp_path))
    assert module.cost.counts is not None
    assert module.cost.counts["responses"] == 2 * 2 * 2 * 3


def test_a_checkpoint_that_knows_no_cost_makes_it_unknown(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    module = make_module(tiny_folder())
    make_trainer(tmp_path, RunCheckpoint()).fit(module, make_data(tmp_path))
    path = tmp_path / "checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["clp_lightning_cost"]
    torch.save(checkpoint, path)
    make_trainer(tmp_path, max_steps=3).fit(module, make_data(tmp_path), ckpt_path=path)
    report = module.cost_report()
    assert report["responses"] is report["optimizer_steps"] is report["wall_s"] is None
    assert report["trained_parameters"] > 0


def test_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    cost = Cost()
    cost.start()
    now[0] = 2.0
    assert cost.state_dict()["wall_s"] == 2.0  # and it goes on
    now[0] = 3.0
    cost.stop()
    now[0] = 10.0
    cost.stop()
    assert cost.to_dict()["wall_s"] == 3.0
    resumed = Cost()
    resumed.load_state_dict(cost.state_dict())
    resumed.start()
    now[0] = 11.0
    resumed.stop()
    assert resumed.wall_s == 4.0
