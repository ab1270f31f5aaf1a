"""The key of a judge is nowhere: in no file of a run, no output, no error."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from clp_lightning import CLPModule
from clp_lightning.__main__ import run
from clp_lightning.cli import main
from tests.rewards.server import KEY, serving, soon
from tests.runs import run_config, write_config


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def judged(folder: Path, base: Path, url: str, **trainer: Any) -> dict[str, Any]:
    """``run_config`` with the judge as a reward, the endpoint written the short way."""
    config = run_config(folder, base, **trainer)
    endpoint = {"model": "m", "base_url": url, "max_retries": 0, "cache": str(folder / "answers")}
    rubric = "{topic}: {prompt} -> {completion}"
    judge = {"class_path": "Judge", "init_args": {"endpoint": endpoint, "rubric": rubric}}
    config["model"]["init_args"]["rewards"]["judge"] = judge
    config["model"]["init_args"]["grid"] = {"divisions": 1, "alphas": [0.1]}
    return config


def score(question: str, times: int) -> str:
    """A score, and the key, which a server sees in every request."""
    return f"I was called with {KEY}. Score: {1 + sum(map(ord, question)) % 10}"


def test_a_run_does_not_hold_the_key(
    tiny_folder: Callable[..., Path], tmp_path: Path, capfd: Any, caplog: Any
) -> None:
    with serving(score) as server:
        config = judged(tmp_path, tiny_folder(), server.url)
        config["trainer"]["callbacks"].append({"class_path": "SamplesCallback"})
        path = write_config(tmp_path / "run.yaml", config)
        caplog.set_level("DEBUG")
        main(["fit", "--config", path])
        asked = len(server.questions)
        assert asked > 12 and set(server.keys) == {KEY}
        main(["fit", "--config", path])  # the same run again is told nothing new
        assert len(server.questions) == asked
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    saved = torch.load(checkpoint, weights_only=True)
    endpoint = saved["hyper_parameters"]["rewards"]["judge"]["init_args"]["endpoint"]
    assert endpoint["init_args"]["base_url"] == server.url
    module = CLPModule.load_from_checkpoint(checkpoint)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > asked  # one file for each answer, and the run's own
    assert [path for path in written if KEY.encode() in path.read_bytes()] == []
    said = repr(capfd.readouterr()) + caplog.text
    assert KEY not in said + str(saved) + str(dict(module.hparams)) + str(vars(module))
    reward = module.rewards.rewards["judge"]
    assert KEY not in str(vars(reward)) + str(vars(reward.endpoint))
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["model"]["init_args"]["rewards"]["judge"]["class_path"].endswith(".Judge")


@pytest.mark.parametrize("status", [401, 500])
def test_an_error_in_the_middle_of_a_run_does_not_tell_the_key(
    status: int, tiny_folder: Callable[..., Path], tmp_path: Path, capfd: Any, monkeypatch: Any
) -> None:
    def answer(question: str, times: int) -> Any:
        failing = len(server.questions) > 12  # after the statistics
        return soon(status, f"Incorrect API key: {KEY}") if failing else score(question, times)

    monkeypatch.setenv("CLP_LIGHTNING_TRACEBACK", "1" if status == 500 else "")
    with serving(answer) as server:
        path = write_config(tmp_path / "run.yaml", judged(tmp_path, tiny_folder(), server.url))
        with pytest.raises(ValueError if status == 500 else SystemExit) as raised:
            run(["fit", "--config", path])
    error: BaseException | None = raised.value
    shown = capfd.readouterr()
    told = shown.err + "".join(traceback.format_exception(error))
    assert "Reward 'judge'" in told and "Incorrect API key: [key]" in told
    assert KEY not in told + shown.out
    assert [p for p in tmp_path.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()] == []
    while error is not None:  # nor do those behind it, which a debugger shows
        assert not hasattr(error, "request")
        error = error.__cause__ or error.__context__


def test_a_run_without_a_key_ends_before_a_model_is_loaded(
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
    capfd: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with serving(score) as server:
        config = judged(tmp_path, tiny_folder(), server.url)
        config["model"]["init_args"]["pretrained"] = str(tmp_path / "nowhere")
        with pytest.raises(SystemExit):
            run(["fit", "--config", write_config(tmp_path / "run.yaml", config)])
        assert not server.keys
    assert "set the environment variable OPENAI_API_KEY" in capfd.readouterr().err
