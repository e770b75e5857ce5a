"""reward.function: how it is found and called, and every way in which it can be wrong, each said in one line."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_gil.config import ConfigError, RewardFunctionSection
from megatron_gil.data.rows.demonstrations import ResponseDataset
from megatron_gil.data.rows.preferences import PreferenceDataset
from megatron_gil.training.reward_function import RewardFunction, RewardFunctionError, RewardRow, reward_rows
from tests.world import write_rows

SOURCE = """
import threading, time
import numpy as np
import torch

CALLS = []
constant = 3

def lengths(prompts, responses):
    CALLS.append((list(prompts), list(responses), threading.current_thread()))
    return [len(response) for response in responses]

def answers(responses, answer):
    return [float(response.strip() == right) for response, right in zip(responses, answer)]

def optional(responses, level=None):
    return [0.0 if level is None or found is None else float(found) for found in level or responses]

def everything(**columns):
    CALLS.append(columns)
    return [1.0] * len(columns["responses"])

def one_short(responses, **_): return [0.0] * (len(responses) - 1)
def nothing(responses, **_): pass
def a_text(responses, **_): return "x" * len(responses)
def a_generator(responses, **_): return (0.0 for _ in responses)
def texts(responses, **_): return ["good" if r == "moon" else 1 for r in responses]
def no_opinion(responses, **_): return [None for r in responses]
def nan(responses, **_): return [float("nan") if r == "moon" else 0.0 for r in responses]
def too_large(responses, **_): return [1e39 for r in responses]
def huge(responses, **_): return [10 ** 400 for r in responses]
def of_numpy(responses, **_): return np.arange(len(responses), dtype=np.float32)
def of_torch(responses, **_): return torch.arange(len(responses))
def truths(responses, **_): return [r == "moon" for r in responses]
def numpy_truths(responses, **_): return [np.bool_(r == "moon") for r in responses]
def raises(responses, **_):
    return [1 / len(r.replace("moon", "")) for r in responses]
def raises_for_many(responses, **_):
    if len(responses) > 1:
        raise RuntimeError("too many\\nat once")
    return [0.0]
def exits(responses, **_): raise SystemExit(3)
def no_data(responses, **_): return torch.zeros(len(responses), device="meta")
class Mute(Exception):
    def __str__(self): raise KeyError
    __repr__ = __str__
def mute(responses, **_): raise Mute
def mute_answer(responses, **_): return [Mute() for r in responses]
async def awaited(responses, **_): return [0.0] * len(responses)
def appends(responses, tags):
    for response, row in zip(responses, tags):
        row.append(response)
    return [float(len(row)) for row in tags]
def sleeps(responses, **_):
    time.sleep(60 if "moon" in responses else 0)
    return [0.0] * len(responses)
def raises_and_then_sleeps(responses, **_):
    time.sleep(60 if len(responses) == 1 else 0)
    raise RuntimeError("at first")
def by_position(responses, /): return [0.0] * len(responses)
def needs_nothing(texts): return [0.0] * len(texts)
def meets(responses, **_):
    BARRIER.wait(timeout=20)
    return [float(r) for r in responses]
BARRIER = threading.Barrier(3)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("functions")
    (directory / "rules.py").write_text(SOURCE)
    (directory / "broken.py").write_text("import json\njson.loads('{')\n")
    return directory


def _function(place: Path, name: str, **settings: Any) -> RewardFunction:
    return RewardFunction(RewardFunctionSection(function=f"{place / 'rules.py'}:{name}", **settings))


def _dataset(directory: Path, *responses: str, **fields: list[Any]) -> ResponseDataset:
    """Rows whose prompts are p0, p1, ...; None leaves a field out."""
    rows = [{"prompt": f"p{i}", "response": text} for i, text in enumerate(responses)]
    for name, values in fields.items():
        for row, value in zip(rows, values, strict=True):
            row |= {} if value is None else {name: value}
    path = write_rows(directory / "rows.jsonl", rows)
    return ResponseDataset(path, None, max_tokens=8, max_prompt_tokens=4, others=True)


def _rows(dataset: ResponseDataset) -> list[RewardRow]:
    return [row for row_id in range(len(dataset)) for row in reward_rows(dataset, row_id)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_it_is_called_with_lists_and_its_numbers_keep_their_order(place: Path, tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, "a", "bbb", "")
    function = _function(place, "lengths")
    assert function.score(_rows(dataset), dataset) == [1.0, 3.0, 0.0]
    prompts, responses, thread = function._function.__globals__["CALLS"][-1]
    assert (prompts, responses) == (["p0", "p1", "p2"], ["a", "bbb", ""])
    assert thread is not threading.main_thread()
    assert function.score([], dataset) == []
    for name, expected in {
        "of_numpy": [0.0, 1.0, 2.0],
        "of_torch": [0.0, 1.0, 2.0],
        "truths": [0.0, 0.0, 0.0],
        "numpy_truths": [0.0, 0.0, 0.0],
    }.items():
        assert _function(place, name).score(_rows(dataset), dataset) == expected
    assert _function(place, "truths").score(_rows(_dataset(tmp_path, "moon", "sun")), dataset) == [1.0, 0.0]


def test_fields_of_the_rows_arrive_under_their_names(place: Path, tmp_path: Path) -> None:
    """As the file has them; None where a row has none; those that the function does not take are left out."""
    dataset = _dataset(
        tmp_path, "4", " 5 ", "6", answer=["4", "5", "7"], level=[3, None, 1], tags=[["a"], [], None], group=["x"] * 3
    )
    assert dataset.other_names == ("answer", "group", "level", "tags")
    for name in ("answers", "optional", "everything", "lengths"):
        _function(place, name).check_fields(dataset)
    assert _function(place, "answers").score(_rows(dataset), dataset) == [1.0, 1.0, 0.0]
    assert _function(place, "optional").score(_rows(dataset), dataset) == [3.0, 0.0, 1.0]
    everything = _function(place, "everything")
    assert everything.score(_rows(dataset)[:2], dataset) == [1.0, 1.0]
    assert everything._function.__globals__["CALLS"][-1] == {
        "prompts": ["p0", "p1"],
        "responses": ["4", " 5 "],
        "answer": ["4", "5"],
        "group": ["x", "x"],
        "level": [3, None],
        "tags": [["a"], []],
    }


def test_both_responses_of_a_pair_are_scored(place: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "p", "chosen": "4", "rejected": "5", "answer": "4"}])
    pairs = PreferenceDataset(path, None, max_tokens=8, max_prompt_tokens=4, others=True)
    assert _function(place, "answers").score(reward_rows(pairs, 0), pairs) == [1.0, 0.0]
    assert pairs.passed_on(0) == {"answer": "4"}


def test_a_function_may_write_into_what_it_is_given(place: Path, tmp_path: Path) -> None:
    """No other response of the same row sees it, nor a second call."""
    path = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "p", "chosen": "4", "rejected": "5", "tags": ["a"]}])
    pairs = PreferenceDataset(path, None, max_tokens=8, max_prompt_tokens=4, others=True)
    rows, function = reward_rows(pairs, 0), _function(place, "appends")
    assert [function.score(rows, pairs) for _ in range(2)] == [[2.0, 2.0]] * 2


def test_threads_call_at_the_same_time(place: Path, tmp_path: Path) -> None:
    """Three calls that wait for one another, of 2, 2 and 1 rows."""
    dataset = _dataset(tmp_path, *map(str, range(5)))
    assert _function(place, "meets", threads=3).score(_rows(dataset), dataset) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert _function(place, "lengths", threads=64).score(_rows(dataset), dataset) == [1.0] * 5


MOON = ("sun", "moon", "sea")
FAILURES = {
    "one_short": "returned 2 numbers for 3 rows, the first row 1 of {rows}; it must return one a row",
    "nothing": "returned None (NoneType), not a list of one number a row, for 3 rows, the first row 1 of {rows}",
    "a_text": "returned 'xxx', not a list of one number a row, for",
    "a_generator": "(generator), not a list of one number a row, for",
    "texts": "gives row 2 of {rows} 'good', which is no number (response 'moon')",
    "no_opinion": "gives row 1 of {rows} None (NoneType), which is no number (response 'sun')",
    "nan": "gives row 2 of {rows} nan (float), which is not finite in float32 (response 'moon')",
    "too_large": "gives row 1 of {rows} 1e+39 (float), which is not finite in float32",
    "huge": "gives row 1 of {rows} 10000000",
    "raises": "raised ZeroDivisionError: division by zero (rules.py:{zero}) for row 2 of {rows} (response 'moon')",
    "raises_for_many": "raised RuntimeError: too many at once (rules.py:{many}) for 3 rows, the first row 1 of {rows}",
    "no_data": "raised NotImplementedError: Cannot copy out of meta tensor; no data! for 3 rows, the first row 1 of",
    "mute": "raised Mute: (str raised KeyError) (rules.py:",
    "mute_answer": "gives row 1 of {rows} (repr raised KeyError) (Mute), which is no number",
    "exits": "raised SystemExit: 3 (rules.py:{exit}) for row 1 of {rows} (response 'sun')",
}


LINES = {
    name: next(number for number, line in enumerate(SOURCE.split("\n"), start=1) if text in line)
    for name, text in {"zero": "1 / len", "many": "RuntimeError(", "exit": "SystemExit("}.items()
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_one_line_that_names_function_row_and_value(
    name: str, threads: int, place: Path, tmp_path: Path
) -> None:
    dataset = _dataset(tmp_path, *MOON)
    with pytest.raises(RewardFunctionError) as failed:
        _function(place, name, threads=threads).score(_rows(dataset), dataset)
    said = str(failed.value)
    assert said.startswith(f"reward.function={place / 'rules.py'}:{name} ")
    assert "\n" not in said
    if threads == 1:
        assert FAILURES[name].format(rows=dataset.path, **LINES) in said


@pytest.mark.parametrize("threads", [1, 3])
def test_a_call_that_takes_too_long_is_left(threads: int, place: Path, tmp_path: Path) -> None:
    dataset, started = _dataset(tmp_path, *MOON), time.monotonic()
    with pytest.raises(RewardFunctionError) as failed:
        _function(place, "sleeps", threads=threads, timeout_s=0.5).score(_rows(dataset), dataset)
    assert time.monotonic() - started < 30
    first = f"3 rows, the first row 1 of {dataset.path}" if threads == 1 else f"row 2 of {dataset.path}"
    assert str(failed.value).endswith(f":sleeps has not answered within reward.timeout_s=0.5 for {first}")


def test_a_row_that_is_looked_for_too_long_does_not_hide_what_was_raised(place: Path, tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, *MOON)
    with pytest.raises(RewardFunctionError, match=r"raised RuntimeError: at first \(rules.py:\d+\) for 3 rows"):
        _function(place, "raises_and_then_sleeps", timeout_s=0.5).score(_rows(dataset), dataset)


REFUSALS = {
    "rules": "must be package.module:name or FILE.py:name",
    "rules.py:": "must be package.module:name or FILE.py:name",
    "{place}/none.py:f": "there is no file {place}/none.py",
    "{place}/rules.py:none": "has no none",
    "{place}/rules.py:constant": "is 3 (int), not a function",
    "{place}/rules.py:by_position": "it takes responses by position alone, and is called by name",
    "{place}/rules.py:awaited": "is async, and is called as a plain function; name one that does asyncio.run of it",
    "{place}/rules.py:needs_nothing": "it takes no argument named responses",
    "{place}/broken.py:f": "cannot be imported: JSONDecodeError: Expecting property name",
    "no_such_package.rules:f": "no module named no_such_package; install it, put its folder in PYTHONPATH, or name its",
    "json.nothing:f": "no module named json.nothing",
    "json:nothing": "has no nothing",
}


@pytest.mark.parametrize("target", REFUSALS)
def test_what_cannot_be_called_is_refused_at_the_start(target: str, place: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        RewardFunction(RewardFunctionSection(function=target.format(place=place)))
    said = str(refused.value)
    assert said.startswith(f"reward.function={target.format(place=place)}")
    assert REFUSALS[target].format(place=place) in said
    assert "\n" not in said


def test_a_function_of_a_package(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, "a", "b")
    function = RewardFunction(RewardFunctionSection(function="tests.training.test_reward_function:_twos"))
    assert function.score(_rows(dataset), dataset) == [2.0, 2.0]


def _twos(responses: list[str]) -> list[float]:
    return [2.0] * len(responses)


def test_fields_that_do_not_fit_are_refused(place: Path, tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, "4", "5", result=["4", None], level=[1, 2])
    with pytest.raises(ConfigError) as refused:
        _function(place, "answers").check_fields(dataset)
    text = f"needs the argument answer, and no row of {dataset.path} has a field of that name; the fields there are "
    assert str(refused.value).endswith(f"{text}level, result")
    with pytest.raises(ConfigError, match="no other fields"):
        _function(place, "answers").check_fields(_dataset(tmp_path, "4"))
    with pytest.raises(ConfigError, match="a field is named responses, which is an argument of"):
        _function(place, "everything").check_fields(_dataset(tmp_path, "4", "5", responses=["4", "5"]))
