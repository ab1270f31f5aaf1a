"""``judge``: two runs side by side, against a real server."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from clp_lightning.__main__ import run
from clp_lightning.cli import main
from clp_lightning.judge import judge, judge_pairs, read_pairs
from clp_lightning.rewards import Endpoint
from tests.judge.test_pairs import record, write
from tests.rewards.server import KEY, serving, soon
from tests.runs import run_config, write_config

CONFIG = Path(__file__).parents[2] / "configs/summarization/judge.yaml"


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def shown(question: str) -> tuple[str, str]:
    """The responses that a question shows as A and as B."""
    found = re.search(r"Response A:\n(.*)\n\nResponse B:\n(.*)\n\nGive", question, re.DOTALL)
    assert found is not None
    return found[1], found[2]


def longer(question: str, times: int) -> str:
    """Prefers the longer response."""
    a, b = (len(text) for text in shown(question))
    return f"I see.\n**Verdict: {'tie' if a == b else 'A' if a > b else 'B'}**"


def files(folder: Path, *pairs: tuple[int, float, str, str]) -> tuple[str, str]:
    """Predictions of two runs; a pair is prompt, weight, first and second response."""
    both = []
    for name, column in (("first", 2), ("second", 3)):
        records = [record(p[0], kind=p[1], completion=p[column]) for p in pairs]
        both.append(str(write(folder / f"{name}.jsonl", *records)))
    return both[0], both[1]


def endpoint(url: str, folder: Path, **options: Any) -> Endpoint:
    settings = {"max_retries": 0, "cache": str(folder / "answers")}
    return Endpoint("m", url, **(settings | options))


PAIRS = [
    (0, 0.25, "xxx", "x"),  # won
    (0, 0.75, "x", "xxx"),  # lost
    (1, 0.25, "xx", "x"),  # won
    (1, 0.75, "x", "y"),  # a tie
    (2, 0.25, "same", "same"),  # not even asked
    (4, 0.75, "xxxx yy", "x"),  # won
]


def test_win_rates_by_hand(tmp_path: Path, capsys: Any) -> None:
    first, second = files(tmp_path, *PAIRS)
    with serving(longer) as server:
        where = ["--first", first, "--second", second, "--out", str(tmp_path / "out")]
        whom = ["--endpoint.model", "m", "--endpoint.base_url", server.url]
        run(["judge", *where, *whom, "--endpoint.cache", str(tmp_path / "answers")])
        # Two for each pair that differs, but those of the first two are the same.
        assert len(server.questions) == 8
        assert {shown(q) for q in server.questions} >= {("xxx", "x"), ("x", "xxx")}
    found = json.loads((tmp_path / "out/judge.json").read_text())
    # By prompt: (1 + 0) / 2, (1 + 1/2) / 2, 1/2, 1.
    assert found["win_rate"]["mean"] == pytest.approx((0.5 + 0.75 + 0.5 + 1) / 4)
    assert 0.5 <= found["win_rate"]["low"] < 0.6 and 0.8 < found["win_rate"]["high"] <= 1
    names = ["prompts", "pairs", "wins", "losses", "ties", "identical", "orders_disagree"]
    assert [found[name] for name in names] == [4, 6, 3, 1, 2, 1, 0]
    assert found["preferred_a"] == 0.5
    assert found["words"] == {"first": 7 / 6, "second": 1}
    quarter, most = found["points"]
    assert quarter["weights"] == {"kind": 0.25, "short": 0.75} and quarter["alpha"] == 0.1
    assert quarter["win_rate"]["mean"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert most["win_rate"]["mean"] == pytest.approx((0 + 0.5 + 1) / 3)
    assert [most[name] for name in names] == [3, 3, 1, 1, 1, 0, 0]
    assert (found["unjudged"], found["fault"]) == (0, None)
    assert found["unmatched"] == {"first": 0, "second": 0}
    printed = capsys.readouterr().out
    assert "0.69" in printed and "judge: " in printed
    assert KEY not in printed + json.dumps(found)


def test_a_judge_that_likes_what_is_shown_first_gives_ties(tmp_path: Path) -> None:
    pairs, _ = read_pairs(*files(tmp_path, *PAIRS))
    with serving("Verdict: A") as server:
        found = asyncio.run(judge_pairs(pairs, endpoint(server.url, tmp_path)))
    assert found["win_rate"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert (found["ties"], found["orders_disagree"], found["preferred_a"]) == (6, 5, 1)


def test_swapping_the_runs_gives_the_other_rate(tmp_path: Path) -> None:
    first, second = files(tmp_path, *PAIRS)
    with serving(longer) as server:
        settings = endpoint(server.url, tmp_path)
        one = judge(first, second, str(tmp_path), settings)
        asked = len(server.questions)
        other = judge(second, first, str(tmp_path), settings)
        assert len(server.questions) == asked  # both orders of every pair are known
    for name in ("mean", "low", "high"):
        opposite = {"low": "high", "high": "low"}.get(name, name)
        assert other["win_rate"][name] == pytest.approx(1 - one["win_rate"][opposite])
    assert (other["wins"], other["losses"]) == (one["losses"], one["wins"])


def test_one_prompt_has_no_interval_and_prompts_are_limited(tmp_path: Path, capsys: Any) -> None:
    first, second = files(tmp_path, *PAIRS)
    with serving(longer) as server:
        found = judge(first, second, str(tmp_path), endpoint(server.url, tmp_path), prompts=1)
    assert found["win_rate"] == {"mean": 0.5, "low": None, "high": None}
    assert found["pairs"] == 2
    with pytest.raises(ValueError, match="prompts must be at least 1"):
        judge(first, second, str(tmp_path), endpoint("http://x", tmp_path), prompts=0)


def test_conversations_and_a_rubric_of_ones_own(tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "Why?"}]
    first = write(tmp_path / "first.jsonl", record(prompt=prompt, completion="{b}"))
    second = write(tmp_path / "second.jsonl", record(prompt=prompt, completion="No."))
    with serving("[[tie]]") as server:
        rubric, pattern = "{prompt}|{a}|{b}", r"\[\[(\w+)\]\]"
        judge(
            str(first), str(second), str(tmp_path), endpoint(server.url, tmp_path), rubric, pattern
        )
    assert sorted(server.questions) == ["Why?|No.|{b}", "Why?|{b}|No."]


@pytest.mark.parametrize("answer", ["I like A.", "Verdict: C", soon(500), soon(400, KEY)])
def test_a_pair_without_a_verdict(answer: Any, tmp_path: Path, capsys: Any) -> None:
    first, second = files(tmp_path, *PAIRS)
    faulty = [True]

    def sometimes(question: str, times: int) -> Any:
        return answer if faulty[0] and shown(question) == ("y", "x") else longer(question, times)

    with serving(sometimes) as server:
        settings = endpoint(server.url, tmp_path)
        with pytest.raises(ValueError, match=r"1 of 6 pairs have no verdict. Of prompt 1") as told:
            judge(first, second, str(tmp_path), settings)
        found = judge(first, second, str(tmp_path), settings, on_fault="none")
        assert (found["pairs"], found["ties"], found["unjudged"]) == (5, 1, 1)
        assert found["fault"] in str(told.value)
        printed = capsys.readouterr().out
        assert "warning: 1 pairs are left out" in printed
        assert KEY not in printed + str(told.value) + json.dumps(found)
        asked = len(server.questions)
        assert asked == 9  # eight, of which the faulty one twice
        faulty[0] = False
        assert judge(first, second, str(tmp_path), settings)["pairs"] == 6
        assert len(server.questions) == asked + 1


def test_no_verdict_at_all_and_bad_arguments(tmp_path: Path) -> None:
    pairs, _ = read_pairs(*files(tmp_path, PAIRS[0]))
    with serving("no idea") as server:
        settings = endpoint(server.url, tmp_path)
        for options, message in [
            ({"on_fault": "none"}, "1 of 1 pairs have no verdict"),
            ({"on_fault": "zero"}, "on_fault must be"),
            ({"rubric": "{prompt} {a}"}, "must contain {prompt}, {a} and {b}"),
            ({"rubric": "{prompt} {a} {b} {weights}"}, "no other name"),
            ({"pattern": "Verdict"}, "0 groups"),
        ]:
            with pytest.raises(ValueError, match=message):
                asyncio.run(judge_pairs(pairs, settings, **options))


def test_responses_without_a_partner_are_told(tmp_path: Path, capsys: Any) -> None:
    first, second = files(tmp_path, *PAIRS)
    Path(second).write_text(Path(second).read_text().split("\n", 1)[1])
    with serving(longer) as server:
        found = judge(first, second, str(tmp_path), endpoint(server.url, tmp_path))
    assert found["pairs"] == 5
    assert "warning: 1 responses of the first have no partner" in capsys.readouterr().out


def test_what_predict_writes_is_what_is_read(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    for seed in (3, 4):
        config = run_config(tmp_path / str(seed), tiny_folder()) | {"seed_everything": seed}
        config["model"]["init_args"]["grid"]["divisions"] = 1
        with pytest.warns(UserWarning, match="before training"):
            main(["predict", "--config", write_config(tmp_path / "run.yaml", config)])
    with serving(longer) as server:
        folders = [str(tmp_path / str(seed) / "run") for seed in (3, 4)]
        found = judge(*folders, str(tmp_path), endpoint(server.url, tmp_path))
    assert (found["prompts"], found["pairs"], len(found["points"])) == (4, 8, 2)
    assert found["unmatched"] == {"first": 0, "second": 0}


def test_the_config_of_the_suite(capsys: Any) -> None:
    header = CONFIG.read_text().split("\nfirst:")[0]
    name = CONFIG.relative_to(CONFIG.parents[2])
    assert f"\n#   python -m clp_lightning judge --config {name}\n" in header
    assert all(f"\n# {field}: " in header for field in ("hardware", "not measured yet"))
    (expected,) = re.findall(r"^# expect: (.+)$", header, re.MULTILINE)
    assert yaml.safe_load(expected) == {"minutes": 30, "metric": "win_rate", "bound": "> 0.5"}
    named = re.findall(r"configs/\S+\.yaml", header)
    assert all((CONFIG.parents[2] / name).is_file() for name in named) and len(named) >= 5
    with pytest.raises(SystemExit) as stopped:
        run(["judge", "--config", str(CONFIG), "--print_config"])
    assert not stopped.value.code
    understood = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(CONFIG.read_text())
    assert understood["endpoint"]["init_args"].items() >= given.pop("endpoint").items()
    assert understood.items() >= given.items()
