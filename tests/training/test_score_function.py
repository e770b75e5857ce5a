"""score and evaluate-reward with reward.function: the same on every layout and after a stop, with and without a model;
and the fields that it reads, which generate writes on."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.faults.running import Answer, Call, Interruption, call_all
from tests.ranks import run_ranks
from tests.world import write_rows

SOURCE = """
def right(prompts, responses, answer):
    return [(r.strip() == a) + len(p) / 1000 for p, r, a in zip(prompts, responses, answer, strict=True)]

def fails(responses, answer):
    if "answer 6" in answer:
        raise KeyError("six")
    return [1.0] * len(responses)
"""
NUM_ROWS = 25  # a stop is heard some rows later
LAYOUTS = {"one": (1, ()), "tp2": (2, ("parallel.tensor_size=2",)), "dp2": (2, ())}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rules.py, responses.jsonl and pairs.jsonl, every second response right."""
    directory = tmp_path_factory.mktemp("rules")
    (directory / "rules.py").write_text(SOURCE)
    rows = [
        {"prompt": "sun " * (i % 3 + 1), "response": f" answer {i}", "answer": f"answer {i - i % 2}", "group": "odd"}
        for i in range(NUM_ROWS)
    ]
    write_rows(directory / "responses.jsonl", [{**row, "tags": [1, None], "score": 7.0} for row in rows])
    pairs = [{**row, "chosen": f" answer {i - i % 2}", "rejected": " no", "extra": None} for i, row in enumerate(rows)]
    for row in pairs:
        del row["response"]
    write_rows(directory / "pairs.jsonl", pairs)
    return directory


def _settings(command: str, place: Path, output: Path, *more: str, function: str = "right") -> list[str]:
    return [
        command,
        f"reward.function={place / 'rules.py'}:{function}",
        f"output={output}",
        "batch.micro_size=2",
        *more,
    ]


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _call(world: Path, world_size: int, *calls: Call) -> list[list[Answer]]:
    return run_ranks(call_all, world_size, list(calls), world)


def _expected(row: dict[str, Any], response: str) -> float:
    return (row[response].strip() == row["answer"]) + len(row["prompt"]) / 1000


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_function_scores_files_without_any_model(world: Path, place: Path, tmp_path: Path, layout: str) -> None:
    size, settings = LAYOUTS[layout]
    responses, pairs = (f"data.train={place / name}.jsonl" for name in ("responses", "pairs"))
    stop = Interruption("scoring", 3, signal.SIGTERM, rank=size - 1)
    stopped, resumed, paired, evaluated = _call(
        world,
        size,
        Call(_settings("score", place, tmp_path / "scores.jsonl", responses, *settings), stop),
        Call(_settings("score", place, tmp_path / "scores.jsonl", responses, "reward.threads=2", *settings)),
        Call(_settings("score", place, tmp_path / "paired.jsonl", pairs, *settings)),
        Call(_settings("evaluate-reward", place, tmp_path / "quality.json", pairs, *settings)),
    )[0]
    codes = [answer.code for answer in (stopped, resumed, paired, evaluated)]
    assert codes == [75, 0, 0, 0], (stopped, resumed, paired, evaluated)
    assert f"of {NUM_ROWS} rows are there" in resumed.stderr
    for given, found in zip(_read(place / "responses.jsonl"), _read(tmp_path / "scores.jsonl"), strict=True):
        score = found.pop("score")
        assert score == pytest.approx(_expected(given, "response"))
        assert found == {name: value for name, value in given.items() if name != "score"}
    for given, found in zip(_read(place / "pairs.jsonl"), _read(tmp_path / "paired.jsonl"), strict=True):
        for side in ("chosen", "rejected"):
            assert found[f"score_{side}"] == pytest.approx(_expected(given, side))
        assert found["answer"] == given["answer"]
        assert "extra" not in found
    assert json.loads((tmp_path / "quality.json").read_text())["overall"]["accuracy"]["value"] == 1.0
    assert (tmp_path / "quality.scored.jsonl").read_bytes() == (tmp_path / "paired.jsonl").read_bytes()


def test_a_failure_on_one_rank_ends_all_and_keeps_the_rows_before(world: Path, place: Path, tmp_path: Path) -> None:
    arguments = _settings(
        "score", place, tmp_path / "scores.jsonl", f"data.train={place / 'responses.jsonl'}", function="fails"
    )
    ranks = [answers[0] for answers in _call(world, 2, Call(arguments))]
    assert [answer.code for answer in ranks] == [1, 1], ranks
    said = [line for line in ranks[0].stderr.splitlines() if line.startswith("megatron-gil score:")]
    rows = place / "responses.jsonl"
    assert said == [
        f"megatron-gil score: reward.function={place / 'rules.py'}:fails raised KeyError: 'six' (rules.py:7) for row 7 "
        f"of {rows} (response ' answer 6')"
    ]
    assert "Traceback" not in ranks[0].stderr + ranks[1].stderr
    assert not (tmp_path / "scores.jsonl").exists()
    assert (tmp_path / "scores.jsonl.part").exists()


def test_a_changed_function_does_not_go_on_with_the_scores_of_another(world: Path, place: Path, tmp_path: Path) -> None:
    (tmp_path / "rules.py").write_text(SOURCE)
    arguments = _settings("score", tmp_path, tmp_path / "scores.jsonl", f"data.train={place / 'responses.jsonl'}")
    stop = Interruption("scoring", 3, signal.SIGTERM, rank=0)
    assert _call(world, 1, Call(arguments, stop))[0][0].code == 75
    (tmp_path / "rules.py").write_text(SOURCE.replace("1000", "100"))
    answer = _call(world, 1, Call(arguments))[0][0]
    assert answer.code == 2
    assert "was begun with other settings: the files of reward.function have changed" in answer.stderr


def test_a_sum_with_a_reward_model_of_what_generate_wrote(world: Path, place: Path, tmp_path: Path) -> None:
    """Prompts with answers -> responses with answers -> scores by either, and by both."""
    prompts = [{"prompt": f"sun {i}", "answer": f"moon {i}", "level": {"of": i}, "score": 3} for i in range(5)]
    data, answered = write_rows(tmp_path / "prompts.jsonl", prompts), tmp_path / "answered.jsonl"
    limits = ["data.max_prompt_tokens=32", "data.max_tokens=48"]
    model = f"models.reward_model={world / 'reward_model'}"
    score = [f"data.train={answered}", "reward.weight=0.5", "reward.model_weight=2", *limits]
    generate = [f"models.policy={world / 'policy'}", f"data.train={data}", "sampling.max_new_tokens=6", *limits]
    calls = [
        ["generate", f"output={answered}", *generate],
        ["score", model, f"data.train={answered}", f"output={tmp_path / 'model.jsonl'}", *limits],
        _settings("score", place, tmp_path / "function.jsonl", f"data.train={answered}"),
        _settings("score", place, tmp_path / "both.jsonl", model, *score),
        [*_settings("score", place, tmp_path / "dry.jsonl", model, *score), "--dry-run"],
        _settings("score", place, tmp_path / "none.jsonl", f"data.train={world / 'preferences.jsonl'}"),
        ["score", f"data.train={answered}", f"output={tmp_path / 'none.jsonl'}"],
    ]
    *answers, refused, without = _call(world, 1, *map(Call, calls))[0]
    assert [answer.code for answer in answers] == [0] * 5, answers
    for row, given in zip(_read(answered), prompts, strict=True):
        assert list(row) == ["prompt", "response", "answer", "level"]
        assert row.items() >= {name: given[name] for name in ("prompt", "answer", "level")}.items()
    model_rows, function_rows, both = (_read(tmp_path / f"{name}.jsonl") for name in ("model", "function", "both"))
    for first, second, row in zip(model_rows, function_rows, both, strict=True):
        assert row["score"] == pytest.approx(2 * first["score"] + 0.5 * second["score"], rel=1e-5)
    assert (refused.code, without.code) == (2, 2)
    assert "needs the argument answer, and no row of" in refused.stderr
    assert "or a function, as reward.function=package.module:name" in without.stderr
