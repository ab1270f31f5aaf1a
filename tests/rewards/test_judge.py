"""The remote judge against a real server: what it asks, reads, remembers."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clp_lightning.described import describe, rebuild
from clp_lightning.rewards import Endpoint, Judge, NoAnswer, Reward, RewardBank
from tests.rewards.rollouts import rollout
from tests.rewards.server import KEY, Reply, Server, serving

RUBRIC = "Question: {prompt}\nAnswer: {completion}\nEnd with a line `Score: N`."


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Judge]:
    """``make(server, rubric, low=0, concurrency=2)``: a judge that remembers in tmp_path."""

    def judge(server: Server, rubric: str = RUBRIC, **options: Any) -> Judge:
        own = {key: options.pop(key) for key in [*options] if key in ("low", "high", "on_fault")}
        own |= {"pattern": options.pop("pattern")} if "pattern" in options else {}
        settings = {"timeout": 5.0, "max_retries": 1, "cache": str(tmp_path / "cache")} | options
        return Judge(Endpoint("m", server.url, **settings), rubric, **own)

    return judge


def by_length(question: str, times: int) -> str:
    """The score is the number of words of the answer."""
    return f"Fine. Score: {len(question.splitlines()[1].split()) - 1}"


def test_a_rubric_is_filled_in_and_the_score_is_read(make: Callable[..., Judge]) -> None:
    with serving(by_length) as server:
        bank = RewardBank({"judge": make(server), "also": lambda completions, **_: [0.5] * 2})
        scores = bank(rollout(["a b c", "{prompt}"], ["why?", "how?"]))
    assert scores.raw.tolist() == [[3.0, 0.5], [1.0, 0.5]]
    assert sorted(server.questions) == [
        "Question: how?\nAnswer: {prompt}\nEnd with a line `Score: N`.",
        "Question: why?\nAnswer: a b c\nEnd with a line `Score: N`.",
    ]
    assert server.keys == [KEY] * 2


def test_the_request_is_what_was_asked_for(make: Callable[..., Judge]) -> None:
    with serving("Score: 2") as server:
        judge = make(server, temperature=None, max_tokens=9, body={"seed": 3, "own": [1]})
        RewardBank({"judge": judge})(rollout(["a"]))
    (request,) = server.requests
    assert list(request.pop("messages")[0]) == ["role", "content"]
    assert request == {"model": "m", "max_tokens": 9, "seed": 3, "own": [1]}


def test_columns_and_conversations(make: Callable[..., Judge]) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    with serving("Score: 2") as server:
        judge = make(server, "{document} | {prompt} | {completion}")
        assert judge.required_columns == ("document",)
        bank = RewardBank({"judge": judge})
        with pytest.raises(ValueError, match=r"'judge' needs the columns \['document'\]"):
            bank.check_columns([])
        raw = bank(rollout(["So.", "No."], [chat, chat[1:]], document=["d", None])).raw
        assert raw[:, 0].isnan().tolist() == [False, True]  # without a document it does not apply
    assert server.questions == ["d | system: Be brief.\nuser: Why? | So."]


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Score: 7", 7.0),
        ("It is **good**.\n\n**Score: 7.5**\n", 7.5),
        ("score:4.", 4.0),
        ("Score: 3 would be harsh. Score: 6", 6.0),
        ("Score: -3", -3.0),
    ],
)
def test_a_score_is_what_the_answer_ends_in(answer: str, score: float) -> None:
    assert Judge(Endpoint("m"), RUBRIC, low=-5).read(answer) == score


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("", "nothing matches"),
        ("Seven.", "nothing matches"),
        ("Score: seven", "nothing matches"),
        ("Score: 7/10", "nothing matches"),
        ("Score: 7,5", "nothing matches"),
        ("Score: 7 of course", "nothing matches"),
        ("Score: 11", r"11 is not in \[1, 10\]"),
        ("Score: 0", r"0 is not in \[1, 10\]"),
        ("Score: nan", "nothing matches"),
    ],
)
def test_other_answers_have_no_score(answer: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Judge(Endpoint("m"), RUBRIC).read(answer)


def test_a_pattern_of_ones_own() -> None:
    judge = Judge(Endpoint("m"), RUBRIC, pattern=r"\[\[(.*?)\]\]")
    assert judge.read("[[3]] because, as I said, [[3.0]]") == 3
    for answer, why in [
        ("[[3]] or [[8]]", r"differ: \['3.0', '8.0'\]"),
        ("[[x]]", "could not convert"),
        ("[[nan]]", r"nan is not in"),
    ]:
        with pytest.raises(ValueError, match=why):
            judge.read(answer)


@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_requests_at_once_than_allowed(limit: int, make: Callable[..., Judge]) -> None:
    there = threading.Barrier(limit)

    def together(question: str, times: int) -> Reply:
        there.wait(timeout=20)  # so many must be there at once
        return Reply(text="Score: 2", delay=0.05)  # and any more would be seen

    with serving(together) as server:
        judge = make(server, concurrency=limit, timeout=30.0)
        RewardBank({"judge": judge})(rollout([str(i) for i in range(6)]))
        assert len(server.questions) == 6
        assert server.most == limit


def test_calls_at_the_same_time_share_the_limit(make: Callable[..., Judge]) -> None:
    there = threading.Barrier(2)

    def together(question: str, times: int) -> Reply:
        there.wait(timeout=20)
        return Reply(text="Score: 2", delay=0.05)

    with serving(together) as server:
        bank = RewardBank({"judge": make(server, concurrency=2, timeout=30.0)})
        asked = [bank.ask(rollout([text, f"{text} {text}"])) for text in "abc"]
        assert bank.answers(asked).raw.tolist() == [[2.0]] * 6
        assert len(server.questions) == 6
        assert server.most == 2


def test_equal_questions_are_put_once(make: Callable[..., Judge]) -> None:
    with serving(by_length) as server:
        raw = RewardBank({"judge": make(server)})(rollout(["a b", "a", "a b"], ["why?"] * 3)).raw
    assert raw[:, 0].tolist() == [2, 1, 2]
    assert len(server.questions) == 2


def test_a_cached_rerun_makes_no_request(make: Callable[..., Judge]) -> None:
    batch = rollout(["a b c", "a"])
    with serving(by_length) as server:
        first = RewardBank({"judge": make(server)})(batch).raw
        assert len(server.questions) == 2
        judge = make(server)
        judge.check()
        torch.testing.assert_close(RewardBank({"judge": judge})(batch).raw, first)
        assert (len(server.questions), server.probes) == (2, 0)
    # Nor does it need a server.
    torch.testing.assert_close(RewardBank({"judge": judge})(batch).raw, first)


PROCESS = """
import asyncio, sys
from clp_lightning.rewards import Endpoint
print("openai" in sys.modules, flush=True)
endpoint = Endpoint("m", sys.argv[1], cache=sys.argv[2], concurrency=4, max_retries=0)
print(asyncio.run(endpoint.ask([str(i % 20) for i in range(40)], float)), flush=True)
input()
print(asyncio.run(endpoint.ask([str(i) for i in range(21)], float)))
"""


def test_two_processes_share_the_answers(tmp_path: Path) -> None:
    numbers = [float(i) for i in range(21)]
    with serving(lambda question, times: Reply(text=question, delay=0.01)) as server:
        process = subprocess.Popen(
            [sys.executable, "-c", PROCESS, server.url, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "False\n"  # the client is imported when it is needed
        # Both ask and write at the same time now.
        endpoint = Endpoint("m", server.url, cache=str(tmp_path), concurrency=4)
        assert asyncio.run(endpoint.ask([str(i) for i in range(21)], float)) == numbers
        assert process.stdout.readline() == f"{numbers[:20] * 2}\n"
        assert 21 <= len(server.questions) <= 41
    # The server is gone; what the other process was told is known.
    assert process.communicate("\n")[0] == f"{numbers}\n"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {json.loads(file.read_text())["answer"] for file in files} == set(map(str, range(21)))
    assert len(files) == 21


def test_whatever_decides_the_answer_is_asked_again(make: Callable[..., Judge]) -> None:
    with serving("Score: 2") as server, serving("Score: 2") as elsewhere:
        variants: list[tuple[Judge, str, str]] = [
            (make(server), "p", "c"),
            (make(server), "p", "other"),
            (make(server), "other", "c"),
            (make(server, RUBRIC + " Be strict."), "p", "c"),
            (make(server, temperature=0.5), "p", "c"),
            (make(server, max_tokens=99), "p", "c"),
            (make(server, body={"seed": 1}), "p", "c"),
            (make(elsewhere), "p", "c"),
        ]
        for _ in range(2):
            for judge, prompt, completion in variants:
                RewardBank({"judge": judge})(rollout([completion], [prompt]))
        assert (len(server.questions), len(elsewhere.questions)) == (7, 1)
        variants[0][0].endpoint.model = "n"
        RewardBank({"judge": variants[0][0]})(rollout(["c"], ["p"]))
        assert len(server.questions) == 8
        # How long to wait and how to read is no part of the answer.
        judge = make(server, timeout=9.0, max_retries=0, concurrency=1, high=5)
        RewardBank({"judge": judge})(rollout(["c"], ["p"]))
        assert len(server.questions) == 8


def test_damaged_and_unreadable_answers_are_asked_again(
    make: Callable[..., Judge], tmp_path: Path
) -> None:
    with serving("Score: 2. Verdict: 8") as server:
        bank = RewardBank({"judge": make(server, pattern=r"Score: (\d)")})
        bank(rollout(["a"]))
        (file,) = (tmp_path / "cache").rglob("*.json")
        for damage in ("", "{", "[1]", '{"answer": 3}', '{"answer": "Verdict"}'):
            file.write_text(damage)
            assert bank(rollout(["a"])).raw.tolist() == [[2.0]]
        assert len(server.questions) == 6
        other = RewardBank({"judge": make(server, pattern=r"Verdict: (\d)")})
        assert other(rollout(["a"])).raw.tolist() == [[8.0]]
        assert len(server.questions) == 6  # the answer is kept, not what was made of it
        assert [path.suffix for path in file.parent.iterdir()] == [".json"]


def test_a_judge_is_described_and_rebuilt(make: Callable[..., Judge]) -> None:
    with serving(by_length) as server:
        judge = rebuild(describe(make(server)), Reward)
        assert isinstance(judge, Judge)
        assert asyncio.run(judge(prompts=["p"], completions=["a b"])) == [2.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rubric": "Judge {prompt}."}, r"must contain \{completion\}"),
        ({"low": 3, "high": 3}, "low < high; got 3, 3"),
        ({"pattern": "("}, r"'\(' is not a regular expression"),
        ({"pattern": "Score: .*"}, "has 0 groups; it needs one"),
        ({"on_fault": "zero"}, "on_fault must be 'raise' or 'none'"),
        ({"base_url": "localhost:8000/v1"}, "base_url must start with http"),
        ({"base_url": f"http://me:{KEY}@host/v1"}, "holds a user, a password"),
        ({"base_url": f"http://host/v1?key={KEY}"}, "holds a user, a password or a query"),
        ({"api_key_env": KEY}, "api_key_env is the name of an environment variable"),
        ({"body": {"n": 2}}, "body cannot set n"),
        ({"timeout": 0}, "timeout > 0"),
        ({"concurrency": 0}, "concurrency >= 1"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    own = {"rubric", "low", "high", "pattern", "on_fault"}
    of_endpoint = {name: value for name, value in options.items() if name not in own}
    of_judge = {"rubric": RUBRIC} | {k: v for k, v in options.items() if k in own}
    with pytest.raises(ValueError, match=message) as raised:
        Judge(Endpoint("m", **of_endpoint), **of_judge)
    assert KEY not in str(raised.value)


def test_a_short_stand_in_for_a_key_is_no_secret(
    make: Callable[..., Judge], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "2")
    with serving("Score: 2") as server:
        assert RewardBank({"judge": make(server)})(rollout(["a"])).raw.tolist() == [[2.0]]


def test_without_the_client_it_says_what_to_install(
    make: Callable[..., Judge], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with serving("Score: 2") as server:
        judge = make(server)
        with pytest.raises(ModuleNotFoundError, match=r"pip install .clp_lightning\[judge\]"):
            judge.check()
        with pytest.raises(ModuleNotFoundError, match=r"pip install .clp_lightning\[judge\]"):
            asyncio.run(judge(prompts=["p"], completions=["c"]))


def test_an_exception_in_place_of_a_score_is_one_response(make: Callable[..., Judge]) -> None:
    def answer(question: str, times: int) -> str:
        return "no idea" if "bad" in question else "Score: 5"

    with serving(answer) as server:
        (score, fault) = asyncio.run(make(server)(prompts=["p", "p"], completions=["a", "bad"]))
    assert score == 5
    assert isinstance(fault, NoAnswer)
