"""Whatever the judge's server does, no response gets a number that it was not given."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clp_lightning.rewards import Endpoint, Judge, RewardBank, RewardError
from tests.rewards.rollouts import length, rollout
from tests.rewards.server import KEY, Reply, Server, serving, soon

nan = math.nan


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Judge]:
    def judge(server: Server, on_fault: Any = "raise", **options: Any) -> Judge:
        settings = {"timeout": 20.0, "max_retries": 1, "cache": str(tmp_path)} | options
        return Judge(Endpoint("m", server.url, **settings), "{completion}", on_fault=on_fault)

    return judge


def completion(message: Any) -> Reply:
    return Reply(body=json.dumps({"choices": [{"index": 0, **message}]}))


def cut(text: str) -> Reply:
    return completion({"message": {"content": text}, "finish_reason": "length"})


FAULTS: dict[str, tuple[Reply | str, str]] = {
    "silence": (Reply(text="Score: 5", delay=2.0), "gave no answer .ReadTimeout; timeout 0.5 s"),
    "lost connection": (Reply(drop=True), "gave no answer .RemoteProtocolError"),
    "too many requests": (soon(429), "answered with status 429"),
    "server error": (soon(500, f"you sent {KEY}"), r"status 500.*you sent \[key\]"),
    "bad request": (soon(400, "too long"), "status 400.*too long"),
    "no JSON": (Reply(body="<html>Score: 5</html>"), "sent what cannot be read .JSONDecodeError"),
    "a page": (
        Reply(body="<html>Score: 5</html>", headers={"Content-Type": "text/html"}),
        "sent what is no chat completion: '<html>",
    ),
    "nothing": (Reply(body=""), "sent what"),
    "no object": (Reply(body="[5]"), "sent what is no chat completion"),
    "no choices": (Reply(body='{"error": null}'), "sent what is no chat completion"),
    "empty choices": (Reply(body='{"choices": []}'), "sent what is no chat completion"),
    "no message": (completion({"text": "Score: 5"}), "sent what is no chat completion"),
    "no text": (completion({"message": {"content": None}}), "sent no text"),
    "a number": (completion({"message": {"content": 5}}), "sent no text"),
    "a refusal": (
        completion({"message": {"content": None}, "finish_reason": "content_filter"}),
        "sent no text .finish_reason: content_filter",
    ),
    "cut off": (cut("Score: 5"), "cut off at its limit of tokens: raise max_tokens"),
    "empty text": ("", "answered '', in which nothing matches"),
    "no score": ("It is good, I would say 5.", "'It is good, I would say 5.', in which nothing"),
    "out of range": ("Score: 50", r"the score 50 is not in \[1, 10\]"),
}


def bad_for_bad(fault: str) -> Callable[[str, int], Reply | str]:
    return lambda question, times: FAULTS[fault][0] if question == "bad" else "Score: 5"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_left_out_or_given_no_score(
    fault: str, make: Callable[..., Judge], tmp_path: Path
) -> None:
    batch = rollout(["good", "bad", "fine"])
    retried = ("silence", "lost connection", "too many requests", "server error")
    asked = 2 if fault in retried else 1
    timeout = 0.5 if fault == "silence" else 20.0
    with serving(bad_for_bad(fault)) as server:
        bank = RewardBank({"also": length, "judge": make(server, timeout=timeout)})
        with pytest.raises(
            RewardError, match=rf"'judge' failed.*{FAULTS[fault][1]}.*'prompt 1'.*: 'bad'"
        ) as raised:
            bank(batch)
        assert KEY not in str(raised.value)
        assert server.questions.count("bad") == asked
        if fault != "silence":  # with a timeout that short, a busy machine may be late as well
            assert server.questions.count("good") == 1  # nobody is asked again to find the one

        bank = RewardBank(
            {"also": length, "judge": make(server, timeout=timeout)}, on_reward_error="drop"
        )
        scores = bank(batch)
        assert scores.kept.tolist() == [True, False, True]
        assert bank.dropped == 1
        told = torch.tensor([5.0, nan, 5.0])
        torch.testing.assert_close(scores.raw[:, 1], told, equal_nan=True)

        bank = RewardBank({"also": length, "judge": make(server, "none", timeout=timeout)})
        with pytest.warns(UserWarning, match=f"1 of 3 responses are .*{FAULTS[fault][1]}"):
            scores = bank(batch)
        assert scores.kept.all()
        torch.testing.assert_close(scores.raw[:, 1], told, equal_nan=True)
        # Only what has a score is remembered.
        assert server.questions.count("bad") == 3 * asked
        assert len([*tmp_path.rglob("*.json")]) == 2


@pytest.mark.parametrize("fault", ["silence", "lost connection", "too many requests"])
def test_what_passes_is_tried_again(fault: str, make: Callable[..., Judge]) -> None:
    def answer(question: str, times: int) -> Reply | str:
        return FAULTS[fault][0] if times == 0 else f"Score: {len(question)}"

    with serving(answer) as server:
        judge = make(server, timeout=0.5 if fault == "silence" else 20.0, max_retries=3)
        raw = RewardBank({"judge": judge})(rollout(["a", "bb", "ccc"])).raw
    assert raw[:, 0].tolist() == [1, 2, 3]
    assert len(server.questions) >= 6


def test_a_server_that_is_never_well_is_asked_as_often_as_allowed(
    make: Callable[..., Judge],
) -> None:
    with serving(lambda *_: soon(503)) as server:
        bank = RewardBank({"judge": make(server, max_retries=3)}, on_reward_error="drop")
        with pytest.warns(UserWarning, match="status 503"):
            scores = bank(rollout(["a", "b"]))
        assert not scores.kept.any() and scores.raw.isnan().all()
        assert len(server.questions) == 2 * 4
        with pytest.raises(ValueError, match=r"scored none of 2 .*status 503"):
            bank.fit(scores.raw)


def test_a_judge_that_answers_nobody_does_not_become_a_statistic(
    make: Callable[..., Judge],
) -> None:
    with serving("no idea") as server:
        bank = RewardBank({"judge": make(server, on_fault="none")})
        with pytest.warns(UserWarning, match="2 of 2 responses are left without a score"):
            raw = bank(rollout(["a", "b"])).raw
    with pytest.raises(ValueError, match="scored none of 2"):
        bank.fit(raw)


# -- what is wrong with the whole judge --------------------------------------------------------


def check(judge: Judge) -> str:
    """What ``check`` and, without it, the first call say."""
    texts = []
    for call in (judge.check, lambda: asyncio.run(judge(prompts=["p"], completions=["c"]))):
        with pytest.raises((ValueError, OSError)) as raised:
            call()
        assert raised.value.__context__ is None  # the client's error knows the request's headers
        frames = [frame for frame, _ in traceback.walk_tb(raised.value.__traceback__)]
        assert KEY not in str([frame.f_locals for frame in frames])  # which some tools print
        texts.append(str(raised.value))
    assert KEY not in "".join(texts)
    assert texts[0] == texts[1]
    return texts[0]


@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_missing_key(
    value: str | None, make: Callable[..., Judge], monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delenv("MY_KEY", raising=False)
    else:
        monkeypatch.setenv("MY_KEY", value)
    for on_fault in ("raise", "none"):
        with serving("Score: 5") as server:
            said = check(make(server, on_fault, api_key_env="MY_KEY"))
            assert not server.keys
    assert "'m' at http://127.0.0.1" in said
    assert "set the environment variable MY_KEY" in said


def test_a_key_from_another_variable(
    make: Callable[..., Judge], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "other\n")  # as it comes from a file
    with serving("Score: 5") as server:
        judge = make(server, api_key_env="MY_KEY")
        judge.check()
        asyncio.run(judge(prompts=["p"], completions=["c"]))
        monkeypatch.setenv("MY_KEY", "renewed")
        asyncio.run(judge(prompts=["p"], completions=["d"]))
    assert server.keys == ["other", "other", "renewed"]


def test_a_key_that_no_header_can_hold(
    make: Callable[..., Judge], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nsecond line")
    with serving("Score: 5") as server:
        assert "OPENAI_API_KEY holds blanks" in check(make(server))


@pytest.mark.parametrize("on_fault", ["raise", "none"])
def test_a_refused_key_and_an_unknown_model_stop_at_once(
    on_fault: str, make: Callable[..., Judge]
) -> None:
    texts = [f"answer {i}" for i in range(20)]
    for status, said in [(401, "refuses the key .status 401"), (404, "knows no model 'm'")]:
        with serving(lambda *_, s=status: soon(s, f"Incorrect: {KEY}")) as server:
            bank = RewardBank({"judge": make(server, on_fault, concurrency=1)})
            with pytest.raises(RewardError, match=rf"{said}.*Incorrect: \[key\]") as raised:
                bank(rollout(texts))
            # One question is enough to know (and one more to name a response).
            assert len(server.questions) <= 2
            assert KEY not in str(raised.value)


def test_a_refused_key_does_not_stay_in_the_frames(make: Callable[..., Judge]) -> None:
    with serving(lambda *_: soon(401, f"bad {KEY}")) as server:
        server.models = soon(401, f"bad {KEY}")
        said = check(make(server))
    assert "refuses the key (status 401): correct the environment variable OPENAI_API_KEY" in said


def test_a_cache_that_cannot_be_written_is_an_error(
    make: Callable[..., Judge], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with serving("Score: 5") as server:
        judge = make(server, on_fault="none", cache=str(tmp_path / "file"))
        with pytest.raises(OSError, match="file"):
            asyncio.run(judge(prompts=["p"], completions=["c"]))


def test_a_server_that_is_not_there(make: Callable[..., Judge]) -> None:
    with serving("Score: 5") as server:
        pass
    judge = make(server, max_retries=0)
    with pytest.raises(ConnectionError, match=r"start the server, or correct base_url") as raised:
        judge.check()
    assert raised.value.__context__ is None
    assert server.url in str(raised.value)
    with pytest.raises(RewardError, match=r"'m' at http://127.*gave no answer .*refused|attempts"):
        RewardBank({"judge": judge})(rollout(["a"]))


def test_a_server_that_does_not_list_its_models_is_there(make: Callable[..., Judge]) -> None:
    with serving("Score: 5") as server:
        for reply in (soon(404), soon(405), Reply(body="no JSON")):
            server.models = reply
            make(server).check()
        assert server.probes == 3


def test_the_log_does_not_hold_the_key(
    make: Callable[..., Judge], caplog: pytest.LogCaptureFixture
) -> None:
    names = ["", "openai", "httpx2", "httpcore2", "httpx", "httpcore"]
    for name in names:
        caplog.set_level(logging.DEBUG, name)
    with serving(bad_for_bad("server error")) as server:
        judge = make(server, on_fault="none")
        judge.check()
        with pytest.warns(UserWarning, match="left without a score"):
            RewardBank({"judge": judge})(rollout(["bad", "good"]))
    assert "POST" in caplog.text
    assert KEY not in caplog.text


def test_waiting_for_the_server_does_not_hold_up_others(make: Callable[..., Judge]) -> None:
    ended = []

    async def other(completions: list[str], **_: Any) -> list[float]:
        await asyncio.sleep(0.05)
        ended.append(time.monotonic())
        return [0.0] * len(completions)

    with serving(lambda *_: Reply(text="Score: 5", delay=0.3)) as server:
        RewardBank({"judge": make(server), "other": other})(rollout(["a"]))
        assert time.monotonic() - ended[0] > 0.1
