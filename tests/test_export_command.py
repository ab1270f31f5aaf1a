"""The `export` command and the card of an export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from clp_lightning import (
    LoRA,
    PromptText,
)
from clp_lightning.__main__ import run
from clp_lightning.export import export_model
from tests.helpers import NAMES
from tests.steerables import WEIGHTS, make_steerable

ALPHA = 0.1


def test_the_command(tiny_folder: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    make_steerable(tiny_folder()).save_pretrained(tmp_path / "policy")
    asked = ["export", "--ckpt", str(tmp_path / "policy"), "--out"]
    kept = ["--weights", "kind=.7,short=.3", "--alpha", ".1"]
    run([*asked, str(tmp_path / "one"), *kept])
    assert f"exported: {tmp_path / 'one'}" in capsys.readouterr().out
    assert (tmp_path / "one" / "model.safetensors").is_file()
    presets = {
        "short": {"weights": {"kind": 0.1, "short": 0.9}, "alpha": 0.1},
        "kind": {"weights": {"kind": 1, "short": 0}, "alpha": 0.2},
    }
    (tmp_path / "presets.yaml").write_text(yaml.safe_dump(presets))
    several = ["--presets", str(tmp_path / "presets.yaml")]
    run([*asked, str(tmp_path / "many"), *several, "--format", "peft"])
    for name in presets:
        assert (tmp_path / "many" / name / "adapter_model.safetensors").is_file()
    assert "short 0.9; alpha 0.1" in (tmp_path / "many" / "short" / "README.md").read_text()

    (tmp_path / "bad.yaml").write_text("../x: {weights: {kind: 1, short: 0}, alpha: 0.1}")
    wrong = {
        "not empty": [str(tmp_path / "one"), *kept],
        "Give --weights and --alpha": [str(tmp_path / "new")],
        "not both": [str(tmp_path / "new"), *kept, *several],
        "cannot be the name": [str(tmp_path / "new"), "--presets", str(tmp_path / "bad.yaml")],
        "no weights": [str(tmp_path / "new"), "--weights", "kind:1", "--alpha", "0"],
        "No weight for reward 'short'": [
            str(tmp_path / "new"),
            *("--weights", "kind=1", "--alpha", "0"),
        ],
    }
    for message, args in wrong.items():
        with pytest.raises(SystemExit):
            run([*asked, *args])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert NAMES == ["kind", "short"]


def test_presets_that_cannot_be_written_are_told_before_anything_is(
    tiny_folder: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    make_steerable(tiny_folder()).save_pretrained(tmp_path / "policy")
    asked = ["export", "--ckpt", str(tmp_path / "policy"), "--out", str(tmp_path / "out")]
    good = "{weights: {kind: 1, short: 0}, alpha: 0.1}"
    wrong = {
        f"v1.5: {good}": "'v1.5' cannot be the name of a preset",
        f"1: {good}": "in quotes where YAML reads something else",
        f"Short: {good}\nshort: {good}": "would share a folder",
        "a: {b": "is no YAML",
        "[a, b]": "holds no presets",
        "": "holds no presets",
        f"good: {good}\na: {{weights: 3, alpha: 0.1}}": "Preset 'a'",
        f"good: {good}\na: {{weights: [1, 0], alpha: 0.1}}": "Preset 'a'",
        f"good: {good}\na: {{weights: {{kind: 1, short: 0}}, alpha: x}}": "got 'x'",
        f"good: {good}\na: {{weights: {{kind: 1, short: 1}}, alpha: 0}}": "must sum to 1",
    }
    for text, message in wrong.items():
        (tmp_path / "presets.yaml").write_text(text)
        with pytest.raises(SystemExit):
            run([*asked, "--presets", str(tmp_path / "presets.yaml")])
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_an_adapter_on_a_tied_table_must_not_be_merged(
    tiny_folder: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    asked = ["--weights", "kind=.7,short=.3", "--alpha", ".1", "--format", "peft"]
    cases = {
        "gpt2": (LoRA(rank=2, shared_rank=2), True),
        "llama": (LoRA(rank=2, shared_rank=2), False),
        "t5": (LoRA(rank=2, shared_rank=0), False),  # tied, but nothing is on the output layer
    }
    for kind, (conditioner, expected) in cases.items():
        make_steerable(tiny_folder(kind), conditioner).save_pretrained(tmp_path / kind)
        capsys.readouterr()
        out = tmp_path / f"{kind}-out"
        run(["export", "--ckpt", str(tmp_path / kind), "--out", str(out), *asked])
        for text in (capsys.readouterr().out, (out / "README.md").read_text()):
            assert ("do not merge it" in text) is expected


def test_the_card_says_how_the_policy_was_asked(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    steerable = make_steerable(tiny_folder(chat=True), PromptText())
    steerable.policy.temperature = 0.7
    steerable.policy.encoding.chat_template_kwargs = {"enable_thinking": False}
    export_model(steerable, steerable.preference(WEIGHTS, ALPHA), tmp_path)
    card = (tmp_path / "README.md").read_text()
    for part in (
        r'"[kind: 0.70, short: 0.30; stay close: 0.10]\n"',
        'was given {"enable_thinking": false}',
        "trained at temperature 0.7",
    ):
        assert part in card
    assert "base_model" not in card  # it is a folder
