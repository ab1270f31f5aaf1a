from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clp_lightning import SteerablePolicy
from clp_lightning.__main__ import run
from tests.steerables import WEIGHTS, make_steerable

TALK = [{"role": "user", "content": "tea?"}]


@pytest.fixture
def saved(tiny_folder: Callable[..., Path], tmp_path: Path) -> Path:
    make_steerable(tiny_folder(chat=True)).save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


def greedy(saved: Path, prompt: Any, weights: dict[str, float], alpha: float) -> str:
    policy = SteerablePolicy.from_pretrained(saved)
    return policy.generate([prompt], weights, alpha, temperature=0).completions[0]


@pytest.mark.parametrize("plain", [False, True])
def test_one_prompt(plain: bool, saved: Path, capsys: Any) -> None:
    asked = ["steer", "--ckpt", str(saved), "--prompt", "tea?", "--weights", "kind=.7,short=.3"]
    run([*asked, "--alpha", "0.2", *(["--plain"] if plain else [])])
    expected = greedy(saved, "tea?" if plain else TALK, WEIGHTS, 0.2)
    assert capsys.readouterr().out == expected + "\n"


def test_a_file_of_prompts(saved: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "lines.txt").write_text("tea?\n\nfog\n")
    records = [{"prompt": TALK}, {"prompt": "fog"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, records)))
    for file in ("lines.txt", "rows.jsonl"):
        run(["steer", "--ckpt", str(saved), "--prompts", str(tmp_path / file)])
        first, second = map(json.loads, capsys.readouterr().out.splitlines())
        equal = dict.fromkeys(WEIGHTS, 0.5)
        assert (first["weights"], first["alpha"]) == (equal, 0.1)  # the least that was trained
        assert first["completion"] == greedy(saved, TALK, equal, 0.1)
        assert second["prompt"] == "fog"


def test_a_sweep_shows_every_weighting_and_the_reference(saved: Path, capsys: Any) -> None:
    run(["steer", "--ckpt", str(saved), "--prompt", "tea?", "--sweep", "--divisions", "3"])
    shown = capsys.readouterr().out
    for share in (1, 2 / 3, 1 / 3, 0):
        assert f"{share:.2f} │  {1 - share:.2f} │" in shown
    policy = SteerablePolicy.from_pretrained(saved)
    with policy.policy.reference():
        reference = policy.generate([TALK], WEIGHTS, 0.1, temperature=0).completions[0]
    for text in (reference, greedy(saved, TALK, {"kind": 1, "short": 0}, 0.1)):
        assert text.strip() in shown


def test_turning_the_dial_by_hand(saved: Path, capsys: Any, monkeypatch: Any) -> None:
    lines: Iterator[str] = iter(
        ["kind=1,short=0", "tea?", "kind=0,short=1", "alpha=7", "alpha=1", "a=b is a prompt", ""]
    )
    questions: list[str] = []

    def answer(question: str) -> str:
        questions.append(question)
        return next(lines)

    monkeypatch.setattr("builtins.input", answer)
    run(["steer", "--ckpt", str(saved)])
    shown = capsys.readouterr()
    kind, short = {"kind": 1.0, "short": 0.0}, {"kind": 0.0, "short": 1.0}
    expected = [
        greedy(saved, TALK, kind, 0.1),
        greedy(saved, TALK, short, 0.1),
        greedy(saved, TALK, short, 1.0),
        greedy(saved, [{"role": "user", "content": "a=b is a prompt"}], short, 1.0),
    ]
    assert shown.out == "".join(f"{text}\n" for text in expected)
    assert questions[0] == "[kind 0.5, short 0.5; alpha 0.1] > "
    assert questions[-1] == "[kind 0, short 1; alpha 1] > "
    assert "alpha, the KL strength, must be a number in [0, 1], got 7.0" in shown.err


def test_mistakes_are_told_before_anything_is_answered(
    saved: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "tea"}')
    wrong = {
        "not both": ["--prompt", "a", "--prompts", "b"],
        "leave --weights out": ["--prompt", "a", "--sweep", "--weights", "kind=1,short=0"],
        "holds no prompts": ["--prompts", str(tmp_path / "empty.txt")],
        "a record with 'prompt'": ["--prompts", str(tmp_path / "bad.jsonl")],
        "unknown reward 'kid'": ["--prompt", "a", "--weights", "kid=1,short=0"],
        "Grid.divisions": ["--prompt", "a", "--sweep", "--divisions", "0"],
    }
    for message, args in wrong.items():
        with pytest.raises(SystemExit):
            run(["steer", "--ckpt", str(saved), *args])
        assert message in capsys.readouterr().err
