"""Each watchman sees the failure it is there for, and none of them sees one in the quickstart."""

from __future__ import annotations

import csv
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from clp_lightning import (
    CLPCallback,
    Fixed,
    FixedAlpha,
    Grid,
    Preference,
    RunCheckpoint,
    Vertices,
    Watchmen,
)
from clp_lightning.callbacks.watch import _ADVICE
from clp_lightning.metrics import Estimate
from tests.processes import in_child, on_two_processes
from tests.runs import (
    Counted,
    kind,
    make_data,
    make_module,
    make_trainer,
    run_config,
    write_config,
)

# Switches the watchmen off, so that a failure that brings another is told apart from it.
SILENT: dict[str, Any] = {
    "min_length": 0,
    "min_entropy": 0,
    "max_kl": float("inf"),
    "max_without_spread": 1,
    "min_dial": 0,
}
MAX_STEPS = 40
FRONTS: dict[str, Any] = {
    "limit_val_batches": 1.0,
    "val_check_interval": 30,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
}


def brief(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward: minus the number of tokens."""
    return [-float(len(ids)) for ids in completion_ids]


def same(completions: list[str], **_: Any) -> list[float]:
    """A reward that is the same for everyone."""
    return [0.5 for _ in completions]


def told(caught: list[warnings.WarningMessage]) -> list[str]:
    """What the watchmen said."""
    return [str(one.message) for one in caught if "What to do:" in str(one.message)]


def fit(
    base: Path, folder: Path, watchmen: Watchmen, *callbacks: Any, **options: Any
) -> tuple[list[str], pl.Trainer]:
    """What they said in a run of up to ``MAX_STEPS``."""
    further = options.pop("trainer", {})
    trainer = make_trainer(folder, *callbacks, watchmen, **({"max_steps": MAX_STEPS} | further))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(make_module(base, **options), make_data(folder))
    return told(caught), trainer


def greedy(**weights: float) -> CLPCallback:
    """One preference, and nothing that holds the policy at the reference."""
    return CLPCallback(weights=Fixed(weights), alpha=FixedAlpha(0.0))


CAUSES: dict[str, tuple[str, Callable[[], list[Any]], dict[str, Any]]] = {
    "min_length": (
        r"Since step \d+ the response length has collapsed: [12]\.\d tokens",
        lambda: [greedy(brief=1.0, kind=0.0)],
        {
            "rewards": {"brief": brief, "kind": kind},
            "max_new_tokens": 12,
            "samples_per_prompt": 16,
            "statistics_prompts": 0,
            "lr": 3e-2,
        },
    ),
    "min_entropy": (
        r"Since step \d+ the entropy has collapsed: [\d.e-]+ nats per token",
        lambda: [greedy(kind=1.0, short=0.0)],
        {"lr": 0.3},
    ),
    "max_kl": (
        r"Since step \d+ the KL is beyond its bound: [\d.]+ nats .* above 15 ",
        lambda: [greedy(kind=1.0, short=0.0)],
        {"lr": 0.3, "max_new_tokens": 8},
    ),
    "max_without_spread": (
        r"Since step 0 the reward 'same' has no spread: .* in 100% of the groups",
        list,
        {"rewards": {"kind": kind, "same": same}},
    ),
    # Only what all preferences share is trained.
    "min_dial": (
        r"At step 30 the dial is without effect: value gain 1\.\d, but steering gain 0 ",
        lambda: [CLPCallback(alpha=FixedAlpha(0.01))],
        {
            "rewards": {"kind": kind, "short": Counted(target=9.0)},
            "lr": 0.0,
            "lr_shared": 2e-2,
            "samples_per_prompt": 12,
            "eval_samples": 16,
            "grid": Grid(2, [0.01]),
            "trainer": FRONTS,
        },
    ),
}


@pytest.mark.parametrize("watchman", CAUSES)
def test_a_run_that_fails_is_told_so_once_and_stopped(
    watchman: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    pattern, callbacks, options = CAUSES[watchman]
    off = {name: value for name, value in SILENT.items() if name != watchman}
    said, trainer = fit(
        tiny_folder(),
        tmp_path,
        Watchmen("stop", window=5, **off),
        *callbacks(),
        RunCheckpoint(),
        **options,
    )
    (message,) = said
    assert re.match(pattern, message), message
    assert f"({watchman}). What it usually is: " in message
    assert message.endswith(" The run ends here, because Watchmen were given action: stop.")
    assert 5 <= trainer.global_step < MAX_STEPS
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == trainer.global_step


def test_a_dial_with_effect_is_not_reported(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """The run of the dial without effect, but the copies learn and nothing is shared."""
    options = CAUSES["min_dial"][2] | {"lr": 5e-2, "lr_shared": 0.0, "grid": Grid(1, [0.01])}
    options["trainer"] = FRONTS | {"max_steps": 30}
    watchmen = Watchmen(window=5, **SILENT | {"min_dial": 0.1})
    corners = CLPCallback(weights=Vertices(), alpha=FixedAlpha(0.01))
    said, trainer = fit(tiny_folder(), tmp_path, watchmen, corners, **options)
    module: Any = trainer.lightning_module
    front = module.front_report
    assert front.value_gain.low > 0 and front.steering_gain.low > 0
    assert said == []


def test_warn_lets_the_run_go_on_and_a_resume_does_not_repeat_it(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"rewards": {"kind": kind, "same": same}}
    watchmen = Watchmen(window=4, **SILENT | {"max_without_spread": 0.9})
    path = str(tmp_path / "checkpoints/last.ckpt")

    def steps(until: int, ckpt_path: str | None = None, micro_batches: int = 2) -> list[str]:
        trainer = make_trainer(
            tmp_path,
            RunCheckpoint(every_n_train_steps=1),
            watchmen,
            max_steps=until,
            accumulate_grad_batches=micro_batches,
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module = make_module(tiny_folder(), **options)
            trainer.fit(module, make_data(tmp_path), ckpt_path=ckpt_path, weights_only=True)
        assert trainer.global_step == until
        return told(caught)

    # Micro-batches are no steps; a window lies across a resume; another run is warned anew.
    assert steps(3) == []
    (message,) = steps(6, path)
    assert message.startswith("Since step 0 the reward 'same'") and "ends here" not in message
    assert steps(9, path) == []
    assert len(steps(6)) == 1


def test_two_processes_stop_together(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    config = run_config(tmp_path, tiny_folder(), max_steps=9, limit_val_batches=0)
    config["trainer"]["callbacks"][1] = {
        "class_path": "Watchmen",
        "init_args": {"action": "stop", "window": 3},
    }
    config["model"]["init_args"]["rewards"]["short"] = "tests.callbacks.test_watch.same"
    path = write_config(tmp_path / "config.yaml", config)
    assert in_child(on_two_processes, ["fit", "--config", path]) == 0
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 3


# -- what was recorded of real runs -------------------------------------------------------------


class Recorded(pl.LightningModule):
    """Reports a recorded step after the other, and a recorded front."""

    samples_per_prompt = 6
    trained_steps = 60
    step_report: dict[str, float]
    front_report: Any

    def __init__(self, steps: list[dict[str, float]], **front: Estimate) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.steps, self.step_report = steps, {}
        grid = Preference(torch.eye(3), torch.full((3,), 0.05))
        self.front_report = SimpleNamespace(grid=grid, **front)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.weight * batch.sum()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.step_report = self.steps[self.global_step]

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


NOTHING = {"value_gain": Estimate(), "steering_gain": Estimate(), "predicted_gain": None}


def replay(folder: Path, module: Recorded, watchmen: Watchmen) -> list[str]:
    trainer = make_trainer(
        folder, watchmen, max_steps=len(module.steps), max_epochs=1, limit_val_batches=1
    )
    trainer.callbacks = [each for each in trainer.callbacks if not isinstance(each, CLPCallback)]
    rows: Any = torch.ones(len(module.steps), 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader(rows), DataLoader(rows))
    assert trainer.global_step == len(module.steps)
    return told(caught)


def quickstart(seed: int) -> list[dict[str, float]]:
    """The steps of a run of configs/quickstart.yaml, as TensorBoard has them; see record.py."""
    with open(Path(__file__).with_name("quickstart.csv")) as file:
        rows = [row for row in csv.DictReader(file) if row.pop("seed") == str(seed)]
    return [{name: float(value) for name, value in row.items() if name != "step"} for row in rows]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_they_are_silent_in_the_quickstart(seed: int, tmp_path: Path) -> None:
    steps = quickstart(seed)
    assert len(steps) == 60
    found = json.loads(Path(__file__).with_name("quickstart.json").read_text())["0"]
    front: dict[str, Any] = {"predicted_gain": found["steering_gain"].pop("predicted")}
    for name in ("value_gain", "steering_gain"):
        front[name] = Estimate(**found[name])
    assert replay(tmp_path, Recorded(steps, **front), Watchmen()) == []


def test_one_odd_step_says_nothing_and_many_do(tmp_path: Path) -> None:
    odd = {"length": 1.0, "entropy": 0.0, "kl": 1e4, "without_spread/plain": 1.0}
    steps = quickstart(0)[:20]
    steps[12] = odd
    assert replay(tmp_path, Recorded(steps, **NOTHING), Watchmen()) == []
    steps[12:] = [odd] * 14
    said = replay(tmp_path, Recorded(steps, **NOTHING), Watchmen())
    # Of 10 the least and the largest are out: the second odd KL tells, the eighth odd length
    # (7 of 1 and 1 of 8 tokens are 1.9 on average), the ninth of the others.
    assert [re.findall(r"Since step (\d+) the (\w+)", one)[0] for one in said] == [
        ("4", "KL"),
        ("10", "response"),
        ("11", "entropy"),
        ("11", "reward"),
    ]


def test_a_single_response_has_no_spread_to_lack(tmp_path: Path) -> None:
    module = Recorded([{"without_spread/plain": 1.0}] * 10, **NOTHING)
    module.samples_per_prompt = 1
    assert replay(tmp_path, module, Watchmen()) == []


@pytest.mark.parametrize(
    ("value", "steering", "predicted", "fires"),
    [
        ((0.5, 0.4, 0.6), (0.02, 0.0, 0.04), 0.5, True),
        ((0.5, 0.4, 0.6), (0.02, 0.0, 0.06), 0.5, False),  # perhaps it has an effect
        ((0.5, -0.1, 0.9), (0.02, 0.0, 0.04), 0.5, False),  # perhaps nothing was learnt
        ((-0.5, -0.6, -0.4), (0.02, 0.0, 0.04), -0.5, False),  # a loss has no natural size
        ((0.5, 0.4, 0.6), (0.02, 0.0, 0.04), None, True),  # as the value gain
        ((0.5, None, None), (0.02, None, None), 0.5, False),  # one prompt
    ],
)
def test_the_dial_is_judged_by_its_interval(
    value: Any, steering: Any, predicted: float | None, fires: bool, tmp_path: Path
) -> None:
    front: dict[str, Any] = {
        "value_gain": Estimate(*value),
        "steering_gain": Estimate(*steering),
        "predicted_gain": predicted,
    }
    assert len(replay(tmp_path, Recorded(quickstart(0)[:2], **front), Watchmen())) == fires


def test_the_advice_is_that_of_the_documentation() -> None:
    table = (Path(__file__).parents[2] / "docs/howto/trouble.md").read_text()
    for meaning, remedy in _ADVICE.values():
        assert f"| {meaning} | {remedy} |" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"action": "halt"}, "action must be 'warn' or 'stop'; got 'halt'"),
        ({"window": 2}, "window must be at least 3, .* got 2"),
        ({"min_length": 25}, r"min_length is a share, in \[0, 1\]; got 25"),
        ({"max_kl": 0}, "max_kl must be above 0; got 0"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Watchmen(**arguments)


def test_a_module_that_measures_nothing_is_named(tmp_path: Path) -> None:
    module = pl.LightningModule()
    with pytest.raises(RuntimeError, match="LightningModule must set `step_report`"):
        Watchmen().setup(make_trainer(tmp_path), module, "fit")
