"""Judges and win rates. The language-model judge talks to a local server, as to a real one."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from megatron_gil.config import ConfigError
from megatron_gil.evaluation.judge import ScoreJudge, SwappedOrders, recorded_scores
from megatron_gil.evaluation.llm_judge import LlmJudge, read_verdict
from megatron_gil.evaluation.rubrics import read_rubric


def length_judge(tie_margin: float = 0.0) -> ScoreJudge:
    return ScoreJudge("length", lambda prompt, response: float(len(response)), tie_margin=tie_margin)


def test_score_judge() -> None:
    judge = length_judge(tie_margin=1.0)
    assert judge.compare("p", "long one", "short") == "win"
    assert judge.compare("p", "short", "long one") == "lose"
    assert judge.compare("p", "four", "fives") == "tie"


def test_a_judge_that_likes_the_first_place_gives_ties() -> None:
    assert SwappedOrders("biased", lambda prompt, first, second: "win").compare("p", "a", "b") == "tie"
    assert SwappedOrders("biased", lambda prompt, first, second: "lose").compare("p", "a", "b") == "tie"
    fair = SwappedOrders("fair", length_judge().compare)
    assert [fair.compare("p", "aa", "b"), fair.compare("p", "b", "aa"), fair.compare("p", "a", "b")] == [
        "win",
        "lose",
        "tie",
    ]


def test_recorded_scores() -> None:
    score = recorded_scores([{"prompt": "p", "response": "r", "score": 1.5}], "f.jsonl")
    assert score("p", "r") == 1.5
    with pytest.raises(ConfigError, match=r"f\.jsonl: no score for the response 'other'"):
        score("p", "other")
    with pytest.raises(ConfigError, match='row 1 has no number "score"'):
        recorded_scores([{"prompt": "p", "response": "r"}], "f.jsonl")


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("A is clearer.\nVERDICT: A", "win"),
        ("VERDICT: B", "lose"),
        ("Both fine.\n\n**VERDICT: TIE**\n", "tie"),
        ("VERDICT: A\nor perhaps not", None),  # only the last line counts
        ("I prefer A", None),
        ("VERDICT: A or B", None),
        ("", None),
    ],
)
def test_verdicts_are_read_strictly(answer: str, verdict: str | None) -> None:
    assert read_verdict(answer) == verdict


Answer = Callable[[dict], tuple[int, str]]


@contextmanager
def chat_server(answer: Answer) -> Iterator[tuple[str, list[dict]]]:
    """A server of the chat-completions form on this machine, and the requests it got."""
    requests: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(request)
            status, content = answer(request)
            message = {"role": "assistant", "content": content}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
            data = json.dumps(body if status == 200 else {"error": {"message": content}}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def shown(request: dict) -> tuple[str, str]:
    """The two responses in the order in which the judge saw them."""
    first, second = request["messages"][1]["content"].split("[Response A]\n")[1].split("\n\n[Response B]\n")
    return first, second


def prefer_longer(request: dict) -> tuple[int, str]:
    first, second = shown(request)
    return 200, "Because it is.\nVERDICT: " + ("TIE" if len(first) == len(second) else "AB"[len(first) < len(second)])


@pytest.mark.parametrize("rubric", ["helpful", "harmless", "summary"])
def test_language_model_judge_asks_in_both_orders(rubric) -> None:
    with chat_server(prefer_longer) as (url, requests):
        judge = LlmJudge(model="judge-1", rubric=read_rubric(rubric), base_url=url, api_key="none")
        assert judge.compare("say it", "much longer", "short") == "win"
        assert judge.compare("say it", "short", "much longer") == "lose"
        assert judge.compare("say it", "same", "size") == "tie"
    assert [shown(r) for r in requests[:2]] == [("much longer", "short"), ("short", "much longer")]
    assert {r["model"] for r in requests} == {"judge-1"}
    assert {r["temperature"] for r in requests} == {0.0}
    assert "say it" in requests[0]["messages"][1]["content"]


def test_position_bias_of_the_model_becomes_a_tie() -> None:
    with chat_server(lambda request: (200, "VERDICT: A")) as (url, _):
        assert (
            LlmJudge(model="m", rubric=read_rubric("helpful"), base_url=url, api_key="none").compare("p", "a", "b")
            == "tie"
        )


def test_a_busy_server_and_a_malformed_answer_are_tried_again() -> None:
    answers = iter([(429, "busy"), (503, "gone"), (200, "I like both"), (200, "VERDICT: A"), (200, "VERDICT: B")])
    with chat_server(lambda request: next(answers)) as (url, requests):
        assert (
            LlmJudge(model="m", rubric=read_rubric("helpful"), base_url=url, api_key="none").compare("p", "a", "b")
            == "win"
        )
    assert [r["temperature"] for r in requests] == [0.0, 0.0, 0.0, 0.7, 0.0]


def test_a_model_that_never_gives_a_verdict_is_named() -> None:
    with chat_server(lambda request: (200, "hm")) as (url, requests):
        judge = LlmJudge(model="chatty", rubric=read_rubric("helpful"), base_url=url, api_key="none")
        with pytest.raises(ConfigError, match="judge model chatty: 3 answers without a last line VERDICT"):
            judge.compare("p", "a", "b")
    assert len(requests) == 3


def test_a_server_that_refuses_is_named_in_one_line() -> None:
    with chat_server(lambda request: (401, "no such key")) as (url, _):
        judge = LlmJudge(model="m", rubric=read_rubric("helpful"), base_url=url, api_key="wrong")
        with pytest.raises(ConfigError, match=f"judge model m at {url}.*no such key") as error:
            judge.compare("p", "a", "b")
    assert "\n" not in str(error.value)
