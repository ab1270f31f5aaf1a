"""Two processes do what one does: the same preferences, tokens, gradients, fronts, predictions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clp_lightning.cli import main
from tests.processes import in_child, on_two_processes
from tests.runs import read_lines, run_config, write_config

EVALUATION = 2**31  # fronts and statistics have epochs from here on


def config_of(
    folder: Path, base: Path, accumulate: int, model: dict[str, Any], callback: dict[str, Any]
) -> str:
    """Double precision and plain gradient steps, so that weights differ as gradients do."""
    config = run_config(folder, base, accumulate_grad_batches=accumulate, max_steps=3)
    del config["trainer"]["gradient_clip_val"]
    config["trainer"]["limit_val_batches"] = 0
    config["model"]["init_args"] |= {
        "pretrained": {"name": str(base), "dtype": "float64"},
        "engine": {
            "class_path": "tests.runs.Recorder",
            "init_args": {"path": str(folder / "record-{rank}")},
        },
        "optimizer": {"class_path": "torch.optim.SGD"},
        **model,
    }
    config["trainer"]["callbacks"][0]["init_args"] = callback
    return write_config(folder / "config.yaml", config)


def sampled(folder: Path) -> dict[tuple[int, int, int], Any]:
    """(epoch, prompt id, sample) -> weights, alpha, tokens; equal keys must agree."""
    found: dict[tuple[int, int, int], Any] = {}
    for path in folder.glob("record-*"):
        for record in read_lines(path):
            rows = zip(
                *(record[key] for key in ("prompt_ids", "sample", "weights", "alpha", "tokens")),
                strict=True,
            )
            for prompt_id, sample, *row in rows:
                key = (record["epoch"], prompt_id, sample)
                row[-1] = trimmed(row[-1])
                assert found.setdefault(key, row) == row
    return found


def trimmed(tokens: list[int]) -> list[int]:
    """Without the padding, which depends on the longest response of a batch."""
    while tokens and tokens[-1] == 0:
        tokens = tokens[:-1]
    return tokens


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Weights, and what training has cost."""
    checkpoint = torch.load(folder / "run/checkpoints/last.ckpt", weights_only=True)
    return checkpoint["state_dict"], checkpoint["clp_lightning_cost"]["counts"]


DROPS = {"on_reward_error": "drop", "max_dropped": 1.0}
FULL = {"conditioner": {"class_path": "Mixture"}}
# The lower block is computed once, for sampling and scoring.
UPPER = {"conditioner": {"class_path": "LoRA", "init_args": {"rank": 2, "last_blocks": 1}}}
# AdamW, whose stale moments would move a copy that one process took for idle.
AWAY = {"optimizer": {"class_path": "torch.optim.AdamW"}, "lr": 1e-2}


@pytest.mark.parametrize(
    ("model", "callback"),
    [
        ({}, {}),
        (DROPS | {"rewards": {"kind": "tests.runs.kind", "picky": "tests.runs.picky"}}, {}),
        # One process may lose all responses of a batch, the other none.
        (DROPS | {"rewards": {"kind": "tests.runs.kind", "tea": "tests.runs.fails_on_tea"}}, {}),
        (UPPER, {}),
        ({}, {"weights": {"class_path": "Vertices"}, "per": "step"}),
        # One process trains one copy, the other another: idle is what no process used.
        (AWAY, {"weights": {"class_path": "Vertices"}, "per": "batch"}),
        (AWAY | FULL, {"weights": {"class_path": "Vertices"}, "per": "batch"}),
    ],
    ids=[
        "plain",
        "some dropped",
        "all of a batch dropped",
        "upper",
        "idle",
        "corners",
        "corners, full",
    ],
)
def test_the_same_tokens_and_gradients(
    model: dict[str, Any],
    callback: dict[str, Any],
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    # A pass has 8 batches: with 3 a step the last window of one process is incomplete, and so
    # two processes have steps of 2 x 3 and 2 x 1 batches.
    base = tiny_folder()
    for name, accumulate in (("one", 6), ("two", 3)):
        config = config_of(tmp_path / name, base, accumulate, model, callback)
        if name == "one":
            assert in_child(main, ["fit", "--config", config]) == 0
        else:
            on_two_processes(["fit", "--config", config])
    one, two = sampled(tmp_path / "one"), sampled(tmp_path / "two")
    assert len(one) == 6 * 2 + 2 * 16 * 3 - 4 * 3  # statistics, then two passes but for 4 prompts
    assert one == two

    (one, cost), (two, same_cost) = (read_checkpoint(tmp_path / name) for name in ("one", "two"))
    assert cost == same_cost and cost["responses"] == 2 * 16 * 3 - 4 * 3  # dropped ones too
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-10, atol=1e-10)
    zero_at_first = ("lora_B", "deltas")
    assert any(
        value.abs().max() > 1e-3
        for name, value in one.items()
        if any(part in name for part in zero_at_first)
    )


@pytest.mark.parametrize("before", [1, 2])
def test_a_run_goes_on_with_another_number_of_processes(
    before: int, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """From the middle of a pass, and into the next one."""
    base, folder = tiny_folder(), tmp_path / "two"
    fixed = {"alpha": {"class_path": "FixedAlpha", "init_args": {"alpha": 0.2}}}
    one = config_of(tmp_path / "one", base, 2, {}, fixed)
    assert in_child(main, ["fit", "--config", one, "--trainer.max_steps=6"]) == 0
    for processes, steps in ((before, 3), (3 - before, 6)):
        config = config_of(folder, base, 2 // processes, {}, fixed)
        args = ["fit", "--config", config, f"--trainer.max_steps={steps}", "--ckpt_path=last"]
        if processes == 1:
            assert in_child(main, args) == 0
        else:
            on_two_processes(args)
    assert sampled(folder) == sampled(tmp_path / "one")
    (one_end, cost), (two_end, same_cost) = (read_checkpoint(tmp_path / n) for n in ("one", "two"))
    assert cost == same_cost
    for name in one_end:
        torch.testing.assert_close(two_end[name], one_end[name], rtol=1e-10, atol=1e-10)


def test_fronts_and_predictions_are_the_same(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    config = run_config(tmp_path / "train", tiny_folder(), limit_val_batches=0)
    assert in_child(main, ["fit", "--config", write_config(tmp_path / "train.yaml", config)]) == 0
    checkpoint = f"--ckpt_path={tmp_path / 'train/run'}"
    del config["trainer"]["limit_val_batches"]
    config["data"]["init_args"] |= {"holdout": 5, "eval_batch_size": 2}  # 3 batches
    texts = []
    for name in ("one", "two"):
        config["trainer"]["logger"]["init_args"]["name"] = name
        path = write_config(tmp_path / f"{name}.yaml", config)
        for command in ("test", "predict"):
            args = [command, "--config", path, checkpoint]
            if name == "one":
                assert in_child(main, args) == 0
            else:
                on_two_processes(args)
        folder = tmp_path / "train" / name
        texts.append([(folder / file).read_text() for file in ("front.json", "predictions.jsonl")])
    assert texts[0] == texts[1]
    front = json.loads(texts[0][0])
    assert front["reference"]["n"] == 5 and front["points"][0]["kl"] != 0
    records = [json.loads(line) for line in texts[0][1].splitlines()]
    order = [record["prompt_id"] for record in records]
    assert order == sorted(order) and len(set(order)) == 5
    assert len(records) == 5 * 3  # a grid of three weightings, one sample each
