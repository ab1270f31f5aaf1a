"""A key that stands twice in a config, and what else no reader of configs would understand."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from clp_lightning.__main__ import run
from clp_lightning.cli import main
from clp_lightning.keys import check_keys


@pytest.mark.parametrize(
    "text",
    ["", "3", "a: 1", "[{a: 1}, {a: 2}]", "a: &x {b: 1}\nc: *x\nd: {<<: *x, e: 2}", "? [a]\n: 1"],
)
def test_other_yaml_is_left_alone(text: str) -> None:
    check_keys(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 1\n", "a stands twice, in lines 1 and 3"),
        ("a:\n- {b: 1}\n- b: 1\n  b: 2\n", r"a\.1\.b stands twice, in lines 3 and 4"),
        ("a: {b: 1}\nb: 1\na: 2\n", "a stands twice, in lines 1 and 3"),
        ("a:\n- class_path: 3\n", r"a\.0\.class_path in line 2 is of type int; give the import"),
        ("a: {class_path: {b: c}}", "a.class_path in line 1 is of type map; give the import path"),
        ("a: {class_path: }", "a.class_path in line 1 is of type null; give the import path"),
        (
            "a: {class_path: b, init_args: 3}",
            "a.init_args in line 1 is of type int; give the class's",
        ),
        ("a: {class_path: b, init_args: [c]}", "a.init_args in line 1 is of type seq; give the"),
    ],
)
def test_the_key_is_named(text: str, message: str) -> None:
    with pytest.raises(yaml.YAMLError, match=message):
        check_keys(text)


def test_a_config_with_a_repeated_key_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    text = Path("configs/exact/full.yaml").read_text()
    line = text[: text.index("  max_steps: 2000\n")].count("\n") + 1
    config.write_text(text.replace("  max_steps: 2000\n", "  max_steps: 2000\n  max_steps: 20\n"))
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", str(config)])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert f"trainer.max_steps stands twice, in lines {line} and {line + 1}; remove one" in error
    assert "Traceback" not in error and len(error.splitlines()) <= 4


@pytest.mark.parametrize("command", ["fit", "steer"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            b"trainer:\n  max_steps: 2\n bad: 1\n",
            ": line 3, column 2 is no YAML: expected <block end>, but found '<block mapping start>'"
            ", while parsing a block mapping that begins in line 1.",
        ),
        (
            b"a: 1\n\tb: 2\n",
            ": line 2, column 1 is no YAML: found character '\\t' that cannot start any token, "
            "while scanning for the next token.",
        ),
        (b"a: 1\nb: 2\na: 3", ": a stands twice, in lines 1 and 3; remove one."),
        (b"a", " has to hold keys and values; it holds: a"),
        (b"a: \xe9", " is not in UTF-8 ("),
        (b"\x00", ": unacceptable character #x0000"),
    ],
)
def test_a_broken_file_is_named(
    text: bytes, said: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_bytes(text)
    with pytest.raises(SystemExit) as end:
        run([command, "--config", str(config)])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert f"error: {config}{said}" in error and len(error.splitlines()) <= 3
