"""The language-model judge against a server on this machine that misbehaves: nothing is lost, nothing judged twice."""

import asyncio
import email.utils
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_gil.console import CommandEnded
from megatron_gil.evaluation.comparisons import Comparison
from megatron_gil.evaluation.llm_judge.client import ChatClient
from megatron_gil.evaluation.llm_judge.failures import Failure, failure_of, retry_after_s
from megatron_gil.evaluation.llm_judge.judge import LlmSettings, judge_comparisons
from megatron_gil.evaluation.llm_judge.pace import Pace, Patience
from megatron_gil.evaluation.llm_judge.prompts import pose
from megatron_gil.evaluation.llm_judge.standing import Ruling
from megatron_gil.evaluation.rubrics import read_rubric
from tests.evaluation.chat_server import (
    ChatServer,
    Request,
    Served,
    body,
    chat_server,
    error,
    prefer_longer,
    says,
    shown,
)

SOON = Patience(first_pause_s=0.01, longest_pause_s=0.05)
KEY = "sk-of-nobody-0123456789"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def comparisons(number: int) -> list[Comparison]:
    """Ours is the longer one in every third, theirs in the next, and then both are as long."""
    return [Comparison(prompt=f"p{i}", ours="aaaa"[: 4 - i % 3], theirs="bbbb"[: 2 + i % 3]) for i in range(number)]


def judge(server: ChatServer, rows: list[Comparison], directory: Path, **settings: Any) -> list[Ruling]:
    given: dict[str, Any] = {
        "model": "m",
        "rubric": read_rubric("helpful"),
        "answers": directory / "answers.sqlite",
        "base_url": server.url,
        "patience": SOON,
    }
    return judge_comparisons(rows, LlmSettings(**(given | settings)))


def test_both_orders_are_asked_once_and_agree(tmp_path: Path) -> None:
    rows = comparisons(6)
    with chat_server(lambda request, before: prefer_longer(request)) as server:
        rulings = judge(server, rows, tmp_path)
    assert [r.outcome for r in rulings] == ["win", "tie", "lose"] * 2
    assert rulings[0] == Ruling(outcome="win", ours_first="win", theirs_first="win")
    assert sorted((shown(r).first, shown(r).second) for r in server.requests) == sorted(
        pair for c in rows for pair in ((c.ours, c.theirs), (c.theirs, c.ours))
    )
    assert {(r["model"], r["temperature"], r["max_tokens"]) for r in server.requests} == {("m", 0.0, 1024)}


def test_a_judge_that_likes_the_first_place_gives_ties(tmp_path: Path) -> None:
    with chat_server(lambda request, before: says("VERDICT: A")) as server:
        (ruling,) = judge(server, comparisons(1), tmp_path)
    assert ruling == Ruling(outcome="tie", ours_first="win", theirs_first="lose")


def test_responses_that_differ_in_nothing_that_is_sent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with chat_server(lambda request, before: says("VERDICT: A")) as server:
        (ruling,) = judge(server, [Comparison(prompt="p", ours="<|a|>", theirs="< |a|>")], tmp_path)
        assert len(server.requests) == 1
    assert ruling.outcome == "tie"
    assert "1 of 1 comparisons (100 %)" in capsys.readouterr().err


def test_reasons_that_differ_in_numbers_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(request: Request, before: int) -> Served:
        number = int(shown(request).prompt[1:])
        return prefer_longer(request) if number > 5 else error(400, f"maximum context length: {number}", code=number)

    with chat_server(answer) as server:
        judge(server, comparisons(9), tmp_path)
    assert "refused 6: too long for the judge: 400 maximum context length: " in capsys.readouterr().err


def test_identical_and_repeated_comparisons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = Comparison(prompt="p", ours="as it is", theirs=" as it is\n")
    one, other = Comparison(prompt="p", ours="long", theirs="x"), Comparison(prompt="p", ours="x", theirs="long")
    with chat_server(lambda request, before: prefer_longer(request)) as server:
        rulings = judge(server, [same, one, one, other], tmp_path)
    assert [r.outcome for r in rulings] == ["tie", "win", "win", "lose"]
    assert rulings[0].ours_first is None
    assert len(server.requests) == 2
    assert (
        "4 comparisons (1 identical, which are ties, 1 repeated), 2 to judge in both orders" in capsys.readouterr().err
    )


HTML = Served(body=b"<!DOCTYPE html><html><body>Welcome</body></html>", headers={"Content-Type": "text/html"})
ONCE: dict[str, Callable[[], Served]] = {
    "429 without Retry-After": lambda: error(429, "slow down"),
    "429 with Retry-After": lambda: error(429, "slow down", retry_after=0.05),
    "429 with a Retry-After that is none": lambda: error(429, "slow down", retry_after="soon"),
    "500": lambda: error(500, "oh"),
    "503": lambda: error(503, "oh"),
    "529": lambda: error(529, "overloaded"),
    "408": lambda: error(408, "oh"),
    "409": lambda: error(409, "oh"),
    "a time-out": lambda: Served(delay_s=30.0),
    "a slow drip": lambda: Served(body=says("VERDICT: A").body, drip_s=0.05),
    "a connection cut in half of the body": lambda: Served(body=says("VERDICT: A").body, cut_after=40),
    "a connection cut before the body": lambda: Served(body=says("VERDICT: A").body, cut_after=0),
    "malformed JSON": lambda: Served(body=b'{"choices": [{"mess'),
    "JSON nested too deeply": lambda: Served(body=b"[" * 100_000),
    "no UTF-8": lambda: Served(body=b'{"choices": "\xff\xfe'),
    "an HTML page": lambda: HTML,
    "nothing": lambda: Served(),
    "a list": lambda: body([]),
    "null": lambda: body(None),
    "no choices": lambda: body({"id": "1"}),
    "empty choices": lambda: body({"choices": []}),
    "choices null": lambda: body({"choices": None}),
    "a choice null": lambda: body({"choices": [None]}),
    "a message null": lambda: body({"choices": [{"message": None}]}),
    "a content null": lambda: says(None),
    "a content that is a number": lambda: says(5),
    "a body not compressed as it says": lambda: Served(body=b"plain", headers={"Content-Encoding": "gzip"}),
    "an error with status 200": lambda: body({"error": {"code": 502, "message": "upstream"}}),
    "an answer off-form": lambda: says("I like both."),
    "an empty answer": lambda: says(""),
}


@pytest.mark.parametrize("served", ONCE.values(), ids=ONCE)
def test_what_goes_wrong_once_is_asked_again(served: Callable[[], Served], tmp_path: Path) -> None:
    rows = comparisons(3)
    with chat_server(lambda request, before: prefer_longer(request) if before else served()) as server:
        limit_s = 1.0 if served().delay_s or served().drip_s else 30.0
        rulings = judge(server, rows, tmp_path, timeout_s=limit_s)
        assert [r.outcome for r in rulings] == ["win", "tie", "lose"]
        assert set(server.asked.values()) == {2}
        judge(server, rows, tmp_path)
        assert set(server.asked.values()) == {2}


def test_all_of_it_at_once_loses_nothing_and_judges_nothing_twice(tmp_path: Path) -> None:
    """Every message meets one to three of the troubles before it is answered. Off-form answers are answers."""
    troubles = [served for name, served in ONCE.items() if "off-form" not in name and "time-out" not in name]
    rows = comparisons(30)

    def answer(request: Request, before: int) -> Served:
        number = int(shown(request).prompt[1:])
        return troubles[(number + before) % len(troubles)]() if before <= number % 3 else prefer_longer(request)

    with chat_server(answer) as server:
        rulings = judge(server, rows, tmp_path, timeout_s=3.0)
    assert [r.outcome for r in rulings] == ["win", "tie", "lose"] * 10
    numbers = {message: int(message.split("\np")[1].split("\n")[0]) for message in server.asked}
    assert len(numbers) == 60
    assert all(count == 2 + numbers[message] % 3 for message, count in server.asked.items())


FOR_EVER: dict[str, tuple[Served, str, int]] = {
    "500": (error(500, "out of order"), "500 out of order", 7),
    "429": (error(429, "slow down"), "429 slow down", 7),
    "an HTML page": (HTML, "an HTML page", 7),
    "empty choices": (body({"choices": []}), "without choices", 7),
    "a time-out": (Served(delay_s=30.0), "no answer within 1 s", 3),
    "418": (error(418, "a teapot"), "418 a teapot", 1),
}


@pytest.mark.parametrize(("served", "reason", "tries"), FOR_EVER.values(), ids=FOR_EVER)
def test_one_that_is_never_answered_stops_nothing_and_is_asked_again_by_the_next_run(
    served: Served, reason: str, tries: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(request: Request, before: int) -> Served:
        seen = shown(request)
        return served if seen.prompt == "p3" and seen.first == "aaaa" else prefer_longer(request)

    rows = comparisons(6)
    with chat_server(answer) as server:
        # one after the other, so that nobody else is answered while this one is turned away
        limit_s = 1.0 if served.delay_s else 30.0
        rulings = judge(server, rows, tmp_path, timeout_s=limit_s, concurrency=1)
    assert [r.outcome for r in rulings] == ["win", "tie", "lose", "unanswered", "tie", "lose"]
    assert rulings[3] == Ruling(outcome="unanswered", ours_first=None, theirs_first="win")
    assert max(server.asked.values()) >= tries
    said = capsys.readouterr().err
    assert "0 refused, 1 unanswered" in said
    assert f"unanswered 1: {reason}" in said or reason in said
    with chat_server(lambda request, before: prefer_longer(request)) as server:
        again = judge(server, rows, tmp_path)
    assert again[3].outcome == "win"
    assert len(server.requests) == 1


REFUSED: dict[str, tuple[Served, str]] = {
    "a refusal": (says(None, refusal="I cannot weigh this."), "the model refused"),
    "a content filter at the end": (says("It is", finish_reason="content_filter"), "the model refused"),
    "a content filter before": (error(400, "flagged", code="content_filter"), "400 flagged"),
    "a moderation": (error(403, "your input was flagged"), "403 your input was flagged"),
    "too long": (error(400, "too many", code="context_length_exceeded"), "too long for the judge"),
    "too long for vLLM": (error(400, "This model's maximum context length is 9 tokens."), "too long for the judge"),
    "too large": (error(413), "too long for the judge"),
    "never on form": (says("I like both."), "3 answers without a last line VERDICT"),
    "always cut": (says("I thi", finish_reason="length"), "cut before its verdict"),
    "always cut while it thinks": (says(None, finish_reason="length"), "cut before its verdict"),
}


@pytest.mark.parametrize(("served", "reason"), REFUSED.values(), ids=REFUSED)
def test_one_that_the_judge_refuses_stops_nothing_and_is_asked_no_more(
    served: Served, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(request: Request, before: int) -> Served:
        seen = shown(request)
        return served if seen.prompt == "p3" and seen.first == "aaaa" else prefer_longer(request)

    rows = comparisons(6)
    with chat_server(answer) as server:
        rulings = judge(server, rows, tmp_path)
        asked = len(server.requests)
        assert judge(server, rows, tmp_path) == rulings
        assert len(server.requests) == asked
    assert [r.outcome for r in rulings] == ["win", "tie", "lose", "refused", "tie", "lose"]
    assert rulings[3] == Ruling(outcome="refused", ours_first=None, theirs_first="win")
    said = capsys.readouterr().err
    assert "1 refused, 0 unanswered" in said
    assert "refused 1: " in said
    assert reason in said


def test_off_form_and_cut_answers_are_asked_for_otherwise(tmp_path: Path) -> None:
    with chat_server(lambda request, before: [says("hm"), says("VERDICT: A")][min(before, 1)]) as server:
        judge(server, comparisons(1), tmp_path / "off-form")
    assert sorted((r["temperature"], r["max_tokens"]) for r in server.requests) == [(0.0, 1024)] * 2 + [(0.7, 1024)] * 2
    with chat_server(
        lambda r, before: [says("hm", finish_reason="length"), says("VERDICT: A")][min(before, 1)]
    ) as server:
        judge(server, comparisons(1), tmp_path / "cut", max_tokens=10)
    assert sorted((r["temperature"], r["max_tokens"]) for r in server.requests) == [(0.0, 10)] * 2 + [(0.0, 40)] * 2


def test_a_larger_limit_asks_again_what_was_cut(tmp_path: Path) -> None:
    def answer(request: Request, before: int) -> Served:
        return prefer_longer(request) if request["max_tokens"] > 100 else says("hm", finish_reason="length")

    with chat_server(answer) as server:
        assert judge(server, comparisons(1), tmp_path, max_tokens=20)[0].outcome == "refused"
        assert judge(server, comparisons(1), tmp_path, max_tokens=120)[0].outcome == "win"


ENDS: dict[str, tuple[Served, str, int]] = {
    "401": (error(401, "no such key"), "401 no such key; check the key in OPENAI_API_KEY", 2),
    "403": (error(403, "not yours"), "403 not yours; check the key in OPENAI_API_KEY", 2),
    "404 of a model": (error(404, "model m does not exist", code="model_not_found"), "check --model", 2),
    "404 of a path": (Served(status=404, body=b"<html>"), "404, an HTML page; check --base-url", 2),
    "405": (error(405, "GET alone"), "check --base-url", 2),
    "an unknown model with status 400": (error(400, "Invalid model: m"), "400 Invalid model: m; check --model", 2),
    "a wrong key with status 400": (error(400, "API key not valid"), "check the key in OPENAI_API_KEY", 2),
    "no quota": (error(429, "pay first", code="insufficient_quota"), "nothing left to spend", 2),
    "402": (error(402, "Insufficient Balance"), "nothing left to spend", 2),
    "a pause of a day": (error(429, "tomorrow", retry_after=86400), "asks for a pause of 86,400 s", 1),
    "500 for ever": (error(500, "out of order"), "no answer 10 times in a row: 500 out of order", 1),
    "an HTML page for ever": (HTML, "an HTML page (most URLs end in /v1)", 1),
    "400 for ever": (error(400, "what is that?"), "no answer 100 times in a row: 400 what is that?", 1),
}


@pytest.mark.parametrize(("served", "reason", "exit_code"), ENDS.values(), ids=ENDS)
def test_what_ends_the_command_is_one_line_and_keeps_what_was_judged(
    served: Served, reason: str, exit_code: int, tmp_path: Path
) -> None:
    with chat_server(lambda request, before: prefer_longer(request)) as server:
        judge(server, comparisons(3), tmp_path)
    with chat_server(lambda request, before: served) as server, pytest.raises(CommandEnded) as ended:
        judge(server, comparisons(1000), tmp_path)
    assert ended.value.exit_code == exit_code
    said = str(ended.value)
    assert "\n" not in said
    assert reason in said
    assert f"judge model m at {server.url}: " in said
    assert f"6 answers kept in {tmp_path}/answers.sqlite; the same command goes on from there" in said
    assert len(server.requests) <= 32 * 7  # not a thousand times seven
    with chat_server(lambda request, before: prefer_longer(request)) as server:
        assert {r.outcome for r in judge(server, comparisons(4), tmp_path)} == {"win", "tie", "lose"}
        assert len(server.requests) == 2


def test_a_dead_server_is_asked_no_more_questions_than_it_takes_to_tell(tmp_path: Path) -> None:
    with chat_server(lambda request, before: error(500, "out of order")) as server, pytest.raises(CommandEnded):
        judge(server, comparisons(1000), tmp_path, concurrency=4)
    assert len({str(request["messages"]) for request in server.requests}) == 10


def test_a_server_that_is_not_there_ends_it_with_exit_1(tmp_path: Path) -> None:
    server = ChatServer(lambda request, before: Served())
    server.url = "http://127.0.0.1:1/v1"  # a port that nobody listens on
    with pytest.raises(CommandEnded, match=r"the server cannot be reached: .*; no answer had come") as ended:
        judge(server, comparisons(20), tmp_path)
    assert ended.value.exit_code == 1
    with pytest.raises(CommandEnded, match="no answer at all: the server cannot be reached"):
        judge(server, comparisons(1), tmp_path)


@pytest.mark.parametrize("form", ["seconds", "milliseconds", "a date"])
def test_a_pause_that_is_asked_for_holds_for_all(form: str, tmp_path: Path) -> None:
    """The first request is turned away for 2 s while 15 are in flight: none is sent within that time."""
    told: list[float] = []

    def answer(request: Request, before: int) -> Served:
        if told:
            return prefer_longer(request)
        told.append(time.monotonic())
        date = email.utils.formatdate(time.time() + 3, usegmt=True)  # whole seconds: 2 to 3 from now
        headers = {
            "seconds": {"retry_after": 2},
            "milliseconds": {"retry_after_ms": 2000},
            "a date": {"retry_after": date},
        }
        return error(429, "wait", **headers[form])

    with chat_server(answer) as server:
        rulings = judge(server, comparisons(60), tmp_path, concurrency=4)
    assert {r.outcome for r in rulings} == {"win", "tie", "lose"}
    later = [sent - told[0] for sent in server.times_s if sent - told[0] > 0.1]
    assert min(later) > 1.9
    assert len(later) > 60


def test_pauses_grow_whatever_the_server_asks_for_and_begin_anew_after_an_answer() -> None:
    pace = Pace(16, Patience(first_pause_s=10.0, longest_pause_s=1000.0))

    def pause_s(wait_s: float | None) -> float:
        pace.was_busy(time.monotonic(), wait_s)
        return pace.pause_left_s()

    assert 4.9 < pause_s(None) <= 10
    assert 9.9 < pause_s(0.0) <= 20
    assert 19.9 < pause_s(1.0) <= 40
    pace.was_busy(0.0, 30.0)  # one that was sent before the last pause
    assert 29.9 < pace.pause_left_s() <= 40
    assert 499.9 < pause_s(500.0) <= 500
    for _ in range(20):
        assert pause_s(None) <= 1000
    pace.was_answered()
    assert pace._busy_in_a_row == 0


def test_retry_after_is_read_whatever_it_holds() -> None:
    assert retry_after_s({"retry-after": "2.5"}) == 2.5
    assert retry_after_s({"retry-after": "9", "retry-after-ms": "20"}) == 0.02
    assert retry_after_s({"retry-after": "-3"}) == 0.0
    assert retry_after_s({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0
    assert retry_after_s({"retry-after": "inf"}) == float("inf")
    for text in ("", "nan", "soon", "Wed, 99 Oct 2015", "\u0663"[:0], "1 2"):
        assert retry_after_s({"retry-after": text}) is None
    assert retry_after_s({}) is None


def test_a_rate_limit_is_waited_out_however_often_it_turns_requests_away(tmp_path: Path) -> None:
    """One request in 50 ms is let through: most are turned away more often than a question is tried."""
    last = [0.0]

    def answer(request: Request, before: int) -> Served:
        if time.monotonic() - last[0] < 0.05:
            return error(429, "one at a time", retry_after=0.02)
        last[0] = time.monotonic()
        return prefer_longer(request)

    with chat_server(answer) as server:
        rulings = judge(server, comparisons(12), tmp_path, patience=Patience(tries=4, first_pause_s=0.01))
    assert {r.outcome for r in rulings} == {"win", "tie", "lose"}
    assert set(server.served.values()) == {1}
    assert max(server.asked.values()) > 4


def test_no_more_in_flight_and_a_minute_than_was_said(tmp_path: Path) -> None:
    def answer(request: Request, before: int) -> Served:
        return Served(body=prefer_longer(request).body, delay_s=0.02)

    with chat_server(answer) as server:
        judge(server, comparisons(30), tmp_path / "one", concurrency=5)
        assert server.most_in_flight == 5
    with chat_server(answer) as server:
        judge(server, comparisons(10), tmp_path / "other", requests_per_minute=1200)
    apart = [b - a for a, b in zip(server.times_s, server.times_s[1:], strict=False)]
    assert server.times_s[-1] - server.times_s[0] > 19 * 0.05 * 0.9
    assert sum(apart) / len(apart) > 0.045


def test_a_server_that_takes_other_parameters_is_obeyed_by_all_requests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(request: Request, before: int) -> Served:
        if "max_tokens" in request:
            return error(
                400,
                "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead.",
                param="max_tokens",
                code="unsupported_parameter",
            )
        if "temperature" in request:
            return error(400, "Unsupported value", param="temperature", code="unsupported_value")
        return prefer_longer(request)

    with chat_server(answer) as server:
        rulings = judge(server, comparisons(30), tmp_path, concurrency=2)
    assert {r.outcome for r in rulings} == {"win", "tie", "lose"}
    assert len(server.requests) <= 60 + 2 * 2
    assert server.requests[-1]["max_completion_tokens"] == 1024
    said = capsys.readouterr().err
    assert said.count("judge model m takes max_completion_tokens in place of max_tokens\n") == 1
    assert said.count("judge model m takes no temperature") == 1


def test_a_limit_on_tokens_beyond_the_models_is_no_unknown_parameter() -> None:
    """vLLM names both parameters where request and answer together do not fit."""
    told = json.dumps(
        {
            "message": "'max_tokens' or 'max_completion_tokens' is too large: 500. This model's maximum context length "
            "is 512 tokens and your request has 100 input tokens.",
            "code": 400,
        }
    )
    assert failure_of(400, {}, told).kind == "too_long"


def test_any_status_with_any_body_is_a_failure() -> None:
    for content in (
        "",
        "null",
        "[]",
        '"text"',
        '{"error": null}',
        '{"error": [1]}',
        '{"detail": "x"}',
        "{",
        "[" * 99_999,
    ):
        for status in (*range(300, 600, 3), *range(400, 432), 500, 502, 503, 529, 999):
            failure = failure_of(status, {}, content)
            assert str(status) in failure.reason
            assert "\n" not in failure.reason


RAW: dict[str, bytes] = {
    "nothing": b"",
    "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n",
    "noise": bytes(range(256)) * 40,
    "a redirect to itself": b"HTTP/1.1 307 x\r\nLocation: /v1/chat/completions\r\nContent-Length: 0\r\n\r\n",
    "a redirect to nowhere": b"HTTP/1.1 302 x\r\nLocation: http://[::g]:x/\r\nContent-Length: 0\r\n\r\n",
    "a redirect without a place": b"HTTP/1.1 301 x\r\nContent-Length: 0\r\n\r\n",
    "not modified": b"HTTP/1.1 304 x\r\n\r\n",
    "no content": b"HTTP/1.1 204 x\r\n\r\n",
    "a length that is none": b"HTTP/1.1 200 x\r\nContent-Length: -5\r\n\r\n{}",
    "two lengths": b"HTTP/1.1 200 x\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "chunks that are none": b"HTTP/1.1 200 x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    "chunks cut": b"HTTP/1.1 200 x\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n{",
    "a header without end": b"HTTP/1.1 200 x\r\nX: " + b"x" * 300_000,
    "a header that is none": b"HTTP/1.1 200 x\r\n\xff\xfe: \x00\r\n\r\n{}",
    "an unknown charset": b"HTTP/1.1 500 x\r\nContent-Type: text/html; charset=klingon\r\nContent-Length: 2\r\n\r\n{}",
    "unpacked zstd": b"HTTP/1.1 500 x\r\nContent-Encoding: zstd, br, deflate\r\nContent-Length: 2\r\n\r\n{}",
}


@pytest.mark.parametrize("raw", RAW.values(), ids=RAW)
def test_what_is_no_http_at_all_is_a_failure(raw: bytes) -> None:
    async def ask(url: str) -> object:
        client = ChatClient(model="m", base_url=url, timeout_s=2.0, say=print)
        question = pose("m", "Which?", "p", "a", "b")
        result = await client.complete(question.instruction, question.message, temperature=0.0, max_tokens=5)
        await client.close()
        return result

    with chat_server(lambda request, before: Served(raw=raw)) as server:
        result = asyncio.run(ask(server.url))
    assert isinstance(result, Failure)
    assert result.kind in ("failed", "user")


@pytest.mark.parametrize("status", [200, 400, 401, 500])
def test_the_key_is_nowhere(status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Even where the server says it back, with JSON escapes, and in its headers."""
    escaped = "".join(f"\\u{ord(c):04x}" for c in KEY)

    def answer(request: Request, before: int) -> Served:
        text = f"key {KEY} and ESCAPED\nVERDICT: A"
        served = says(text) if status == 200 else error(status, text)
        return Served(
            status=status, body=served.body.replace(b"ESCAPED", escaped.encode()), headers={"X-Key": f"Bearer {KEY}"}
        )

    with chat_server(answer) as server:
        try:
            judge(server, comparisons(20), tmp_path)
            ended = ""
        except CommandEnded as line:
            ended = str(line)
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    said = capsys.readouterr()
    assert status == 200 or "[the key]" in ended
    assert KEY not in said.out + said.err + ended
    for path in tmp_path.rglob("*"):
        assert KEY.encode() not in path.read_bytes()
    if status == 200:
        assert b"[the key]" in (tmp_path / "answers.sqlite").read_bytes()
