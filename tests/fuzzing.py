"""Seeded damage to our configs and data, and what the command line answers.

Every trial runs in a child that is forked after the imports. A trial is good where it ends in time,
in a run (exit 0) or in a refusal: exit 2, no traceback, few lines, which name what was damaged.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml

# Before the fork, or every child would take their seconds.
import clp_lightning.cli
from tests.damage import SECONDS, Trial, broken, mutated
from tests.tiny import save_tiny

CONFIGS = Path(__file__).parents[1] / "configs"
SHORT = ["--trainer.max_steps=1", "--trainer.limit_val_batches=1"]
MOST_RUNS, MANY = 0.3, 500
"""Damage of which more can be run with is too weak to try anything; a few trials do not tell."""


def bases(folder: Path) -> dict[str, dict[str, Any]]:
    """Configs of ours on a tiny model and a small file, both written below ``folder``."""
    base, data = save_tiny(folder / "base", "llama"), folder / "rows.jsonl"
    rows = [
        {"document": f"tea fog ink owl jam {i} zip sun " * 3, "summary": f"fog {i} ink"}
        for i in range(40)
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    found = {}
    for name in ("quickstart", "warmup"):
        config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        source = config["data"]["init_args"]
        source |= {"source": str(data), "template": "{document}", "holdout": 8, "batch_size": 2}
        del source["conversational"]
        model = config["model"]["init_args"]
        model["pretrained"] = str(base)
        if name == "quickstart":
            source |= {"eval_prompts": 4, "eval_batch_size": 4}
            model["rewards"]["support"] = {
                "class_path": "Rouge",
                "init_args": {"reference": "summary"},
            }
            model["conditioner"]["init_args"]["last_blocks"] = 1
            model |= {"statistics_prompts": 2, "max_new_tokens": 4, "samples_per_prompt": 2}
            model |= {"eval_samples": 1, "grid": {"divisions": 1, "alphas": [0.05]}}
        found[name] = config
    return found


def with_faults(quickstart: dict[str, Any]) -> dict[str, Any]:
    """A config that says what the others leave out: faults of rewards, devices, bounds."""
    config = copy.deepcopy(quickstart)
    config["trainer"] |= {"devices": 1, "strategy": "auto", "accumulate_grad_batches": 2}
    model = config["model"]["init_args"]
    model |= {
        "on_reward_error": "drop",
        "reward_retries": 1,
        "reward_timeout": 30.0,
        "max_dropped": 0.5,
        "rollout_chunks": 2,
        "rollout_batches": 1,
        "max_kl": 1e4,
        "reference_point": [-1.0] * len(model["rewards"]),
        "lr_shared": 1e-4,
    }
    return config


def run(trial: Trial, folder: Path) -> None:
    """Runs ``fit`` on the trial's config in a child, and fills in how it fared."""
    config, log = folder / "config.yaml", folder / "log.txt"
    config.write_text(trial.text)
    child = os.fork()
    if child == 0:
        _answer(["fit", "--config", str(config), *SHORT], folder, log)
    trial.code, trial.seconds = _waited(child)
    trial.output = log.read_text(errors="replace")


def _answer(args: list[str], folder: Path, log: Path) -> None:
    """The child: never returns."""
    code = 1
    try:
        stream = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        os.chdir(folder)
        sys.argv = ["clp_lightning"]
        from clp_lightning.__main__ import run as command

        command(args)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        (folder / "modules.json").write_text(json.dumps(list(sys.modules)))
        os._exit(code)


def _waited(child: int) -> tuple[int | None, float]:
    """How a child ended, None where time was up, and the seconds it took."""
    start = time.monotonic()
    while (seconds := time.monotonic() - start - _queued(child)) < SECONDS:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), seconds
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None, seconds


def _queued(process: int) -> float:
    """Seconds in which it could have run, but other processes had the cores."""
    try:
        return int(Path(f"/proc/{process}/schedstat").read_text().split()[1]) / 1e9
    except OSError:  # not Linux
        return 0.0


def _hasten() -> None:
    """Leaves out what takes most of the time, and what no damage touches."""
    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # as if it were not installed
    commands = clp_lightning.cli.CLI.subcommands()
    clp_lightning.cli.CLI.subcommands = staticmethod(lambda: {"fit": commands["fit"]})  # type: ignore[method-assign]


def _import_early(config: dict[str, Any], folder: Path) -> None:
    """Runs a sound config, and imports here what it imported there."""
    folder.mkdir()
    sound = Trial("nothing", yaml.safe_dump(config, sort_keys=False), [])
    run(sound, folder)
    if sound.code != 0:
        raise RuntimeError(f"A config that is not damaged fails:\n{sound.output}")
    for name in json.loads((folder / "modules.json").read_text()):
        if name not in sys.modules:
            try:
                import_module(name)
            except ImportError:  # made at run time
                continue


def main(
    configs: int, files: int, further: int, seed: int, only: Iterable[int] = ()
) -> list[Trial]:
    """Runs so many trials, or those of them in ``only``; tells of every bad answer; returns all.

    Args:
        configs: Damage to configs of ours.
        files: Damage to data.
        further: Damage to the config ``with_faults``.
        seed: Of all of it.
        only: Numbers of trials, in this order.
    """
    torch.set_num_threads(1)
    _hasten()
    trials: list[Trial] = []
    known: dict[tuple[Any, ...], Trial] = {}  # equal damage is tried once
    with tempfile.TemporaryDirectory() as scratch:
        config_of = bases(Path(scratch))
        for name, config in config_of.items():
            _import_early(config, Path(scratch) / name)
        faults = with_faults(config_of["quickstart"])
        gc.freeze()  # what is there already is not looked through, and copied, in every child
        for number in only or range(configs + files + further):
            # Each has its own seed: one alone is what it was among the others.
            draw = random.Random(f"{seed} {number}")
            folder = Path(scratch) / str(number)
            folder.mkdir()
            config = config_of[draw.choice(list(config_of))]
            if number < configs:
                damaged = mutated(config, draw)
            elif number < configs + files:
                damaged = broken(draw, config, folder)
            else:
                damaged = mutated(faults, draw)
            damage = damaged.text.replace(str(folder), ""), *map(Path.read_bytes, folder.iterdir())
            if damage in known:
                damaged.answered_as(known[damage])
            else:
                run(damaged, folder)
                known[damage] = damaged
            shutil.rmtree(folder)
            trials.append(damaged)
            if damaged.fault:
                print(
                    f"-- {number}: {damaged.name}: {damaged.fault}\n{damaged.output[-1500:]}",
                    flush=True,
                )
            if len(trials) % 100 == 0:
                print(_summary(trials), flush=True)
    print(_summary(trials))
    return trials


def _tally(trials: list[Trial]) -> dict[str, int]:
    return dict(
        Counter(
            "bad" if trial.fault else "a run" if trial.code == 0 else "a refusal"
            for trial in trials
        )
    )


def _summary(trials: list[Trial]) -> str:
    slowest = max(trial.seconds for trial in trials)
    spent = os.times()
    cores = spent.user + spent.system + spent.children_user + spent.children_system
    kinds = sorted({trial.kind for trial in trials})
    by_kind = [(kind, _tally([trial for trial in trials if trial.kind == kind])) for kind in kinds]
    return (
        "".join(f"   {kind}: {tally}\n" for kind, tally in by_kind)
        + f"{len(trials)} trials: {_tally(trials)}; the slowest took {slowest:.1f} s; "
        f"{cores:.0f} s of one core"
    )


def verdict(trials: list[Trial]) -> int:
    """0 where every answer is good and enough of the damage was refused."""
    runs = sum(trial.code == 0 for trial in trials)
    weak = len(trials) >= MANY and runs > MOST_RUNS * len(trials)
    return int(weak or any(trial.fault for trial in trials))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configs", type=int, default=2000)
    parser.add_argument("--files", type=int, default=500)
    parser.add_argument("--further", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", default=[], help="numbers of trials")
    sys.exit(verdict(main(**vars(parser.parse_args()))))
