"""The plan of the exact benchmark can be run: every config that it makes builds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.exact import plan, run
from clp_lightning.cli import main


@pytest.mark.slow
def test_every_run_of_the_plan_builds(tmp_path: Path) -> None:
    runs = plan.plan()
    assert len({one.name for one in runs}) == len(runs)
    for one in runs:
        if one.seed:
            continue
        config = run.build_config(one, tmp_path)
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(config))
        cli = main(["--config", str(file)], run=False)
        assert cli.trainer.logger.name == one.name
        assert str(cli.model.policy.pretrained.name).startswith(str(tmp_path))


def test_methods_sample_alike(tmp_path: Path) -> None:
    budgets: dict[str, set[int]] = {}
    for one in plan.plan():
        if one.label.endswith("responses"):  # says its own budget
            continue
        config = run.build_config(one, tmp_path)
        trainer, model, data = config["trainer"], config["model"]["init_args"], config["data"]
        prompts = data["init_args"]["batch_size"] * trainer.get("accumulate_grad_batches", 1)
        responses = trainer["max_steps"] * prompts * model["samples_per_prompt"]
        budgets.setdefault(one.group, set()).add(responses * model["max_new_tokens"])
    for group in ("methods", "alpha", "hard", "ablations"):
        assert len(budgets[group]) == 1, group


def test_entries_are_changed_by_path() -> None:
    config: dict[str, Any] = {"a": [{"b": 1}, {"c": {"d": 2}}]}
    run.change_entries(config, {"a.1.c.d": 3, "a.0.b": {"e": 4}, "f": 5})
    assert config == {"a": [{"b": {"e": 4}}, {"c": {"d": 3}}], "f": 5}
