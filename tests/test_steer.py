from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clp_lightning import SteerablePolicy
from clp_lightning.__main__ import run
from clp_lightning.functional import check_weights, parse_weights
from tests.steerables import WEIGHTS, make_steerable, named_steerable

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

    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
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


def test_what_is_piped_in_is_answered_and_nothing_else(
    saved: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("tea?\nkind=1,short=0\n"))
    run(["steer", "--ckpt", str(saved)])
    weights = [{"kind": 0.5, "short": 0.5}, {"kind": 1.0, "short": 0.0}]
    expected = [greedy(saved, TALK, each, 0.1) for each in weights]
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in expected)


def test_a_mistake_does_not_end_a_conversation(
    tiny_folder: Callable[..., Path], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    policy = make_steerable(tiny_folder())
    policy.trained.encoding = {"max_prompt_tokens": 9, "on_long": "error"}
    policy.save_pretrained(tmp_path)
    lines = ["tea and more tea", "kin=1,short=0", "kind=1", "tea?", ""]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    run(["steer", "--ckpt", str(tmp_path)])
    shown = capsys.readouterr()
    assert shown.out == greedy(tmp_path, "tea?", {"kind": 0.5, "short": 0.5}, 0.1) + "\n"
    for message in (
        "A prompt has 16 tokens",
        "unknown reward 'kin'",
        "No weight for reward 'short'",
    ):
        assert message in shown.err


def test_ctrl_c_ends_an_answer_and_then_the_conversation(
    saved: Path, capsys: Any, monkeypatch: Any
) -> None:
    lines: Iterator[Any] = iter(["long", "tea?"])
    asked: list[Any] = []
    generate = SteerablePolicy.generate

    def interrupted(self: SteerablePolicy, prompts: Any, *given: Any, **options: Any) -> Any:
        asked.append(prompts[0])
        if len(asked) == 1:
            raise KeyboardInterrupt
        return generate(self, prompts, *given, **options)

    def answer(question: str) -> str:
        line = next(lines, None)
        if line is None:
            raise KeyboardInterrupt
        return str(line)

    monkeypatch.setattr(SteerablePolicy, "generate", interrupted)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", answer)
    run(["steer", "--ckpt", str(saved)])
    monkeypatch.undo()
    equal = {"kind": 0.5, "short": 0.5}
    assert capsys.readouterr().out == "\n" + greedy(saved, TALK, equal, 0.1) + "\n\n"


def test_what_the_help_shows_can_be_typed(
    tiny_folder: Callable[..., Path], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    names = ["a", "b", "c"]
    named_steerable(names, tiny_folder()).save_pretrained(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    run(["steer", "--ckpt", str(tmp_path)])
    (example,) = re.findall(r"\ba=\S+", capsys.readouterr().err)
    check_weights(parse_weights(example), names)


def test_lines_of_jsonl_end_where_json_says(saved: Path, tmp_path: Path, capsys: Any) -> None:
    prompt = "tea\u2028fog\x85ink"  # both are line ends to str.splitlines
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n")
    run(["steer", "--ckpt", str(saved), "--prompts", str(tmp_path / "rows.jsonl")])
    assert json.loads(capsys.readouterr().out)["prompt"] == prompt


def test_mistakes_are_told_before_anything_is_answered(
    saved: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    bad = ['{"text": "tea"}', "{tea", '{"prompt": 5}', '{"prompt": []}', '{"prompt": [{"x": 1}]}']
    for i, line in enumerate(bad):
        (tmp_path / f"{i}.jsonl").write_text(f'{{"prompt": "fog"}}\n{line}\n')
        with pytest.raises(SystemExit):
            run(["steer", "--ckpt", str(saved), "--prompts", str(tmp_path / f"{i}.jsonl")])
        told = capsys.readouterr().err
        assert f"{i}.jsonl must be a record with 'prompt'" in told and line in told
    wrong = {
        "not both": ["--prompt", "a", "--prompts", "b"],
        "leave --weights out": ["--prompt", "a", "--sweep", "--weights", "kind=1,short=0"],
        "holds no prompts": ["--prompts", str(tmp_path / "empty.txt")],
        "are no weights": ["--prompt", "a", "--weights", ""],
        "There is no device 'abacus'": ["--prompt", "a", "--device", "abacus"],
        "unknown reward 'kid'": ["--prompt", "a", "--weights", "kid=1,short=0"],
        "Grid.divisions": ["--prompt", "a", "--sweep", "--divisions", "0"],
    }
    for message, args in wrong.items():
        with pytest.raises(SystemExit):
            run(["steer", "--ckpt", str(saved), *args])
        assert message in capsys.readouterr().err
