"""score and evaluate-reward on preference pairs: the same rows on every layout and after a stop."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.faults.running import Answer, Call, Interruption, call_all
from tests.ranks import run_ranks
from tests.world import write_rows

LAYOUTS = {"tp2": ("parallel.tensor_size=2",), "pp2": ("parallel.pipeline_size=2",), "dp2": ()}
FIELDS = ["prompt", "chosen", "rejected", "score_chosen", "score_rejected", "group"]
NUM_ROWS = 24


def _settings(command: str, world: Path, rows: Path, output: Path, *more: str) -> list[str]:
    limits = ["data.max_prompt_tokens=32", "data.max_tokens=48", "batch.micro_size=2"]
    model = f"models.reward_model={world / 'reward_model'}"
    return [command, model, f"data.train={rows}", f"output={output}", *limits, *more]


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _call(world: Path, world_size: int, *calls: Call) -> list[Answer]:
    answers: list[Answer] = run_ranks(call_all, world_size, list(calls), world)[0]
    return answers


@pytest.fixture(scope="module")
def pairs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a known group in all but every third."""
    rows = _read(world / "preferences.jsonl")
    labels = [{} if i % 3 == 0 else {"group": ("easy", "hard")[i % 2]} for i in range(len(rows))]
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    return write_rows(path, [row | label for row, label in zip(rows, labels, strict=True)])


@pytest.fixture(scope="module")
def whole(world: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one rank writes when nothing stops it; beside it the scores of each response by itself."""
    directory = tmp_path_factory.mktemp("whole")
    sides = [
        write_rows(
            directory / f"{side}_responses.jsonl",
            [{"prompt": row["prompt"], "response": row[side]} for row in _read(pairs)],
        )
        for side in ("chosen", "rejected")
    ]
    calls = [Call(_settings("score", world, pairs, directory / "pairs.jsonl"))]
    calls += [
        Call(_settings("score", world, side, directory / side.name.replace("_responses", "_scores"))) for side in sides
    ]
    answers = _call(world, 1, *calls)
    assert [answer.code for answer in answers] == [0, 0, 0], answers
    return directory


def test_a_pair_has_the_scores_of_its_two_responses(pairs: Path, whole: Path) -> None:
    found = _read(whole / "pairs.jsonl")
    assert len(found) == NUM_ROWS
    for row, given in zip(found, _read(pairs), strict=True):
        assert list(row) == [name for name in FIELDS if name in given or name.startswith("score")]
        assert all(row[name] == value for name, value in given.items())
    for side in ("chosen", "rejected"):
        alone = [row["score"] for row in _read(whole / f"{side}_scores.jsonl")]
        assert len(set(alone)) > NUM_ROWS / 2
        # float32: other rows in a pass are other orders of summation
        assert [row[f"score_{side}"] for row in found] == pytest.approx(alone, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_rows_of_one_rank(
    world: Path, pairs: Path, whole: Path, tmp_path: Path, layout: str
) -> None:
    """A stop in the middle, and another start."""
    score = _settings("score", world, pairs, tmp_path / "pairs.jsonl", *LAYOUTS[layout])
    stop = Interruption("scoring", 4, signal.SIGTERM, rank=1)
    stopped, resumed = _call(world, 2, Call(score, stop), Call(score))
    assert (stopped.code, resumed.code) == (75, 0), stopped.stderr + resumed.stderr
    assert "of 24 rows are there" in resumed.stderr
    found, expected = (_read(directory / "pairs.jsonl") for directory in (tmp_path, whole))
    for row, other in zip(found, expected, strict=True):
        assert list(row) == list(other)
        assert {name: value for name, value in row.items() if not name.startswith("score")}.items() <= other.items()
        for name in ("score_chosen", "score_rejected"):
            assert row[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6)  # float32, other orders of summation


def test_evaluate_reward_of_a_model(world: Path, pairs: Path, whole: Path, tmp_path: Path) -> None:
    """Stopped once; what is there is not overwritten; what is wrong is said before a model is built."""
    output = tmp_path / "q.json"
    evaluate = _settings("evaluate-reward", world, pairs, output)
    mixed = write_rows(tmp_path / "mixed.jsonl", [*_read(pairs)[:3], {"prompt": "sun", "response": "moon"}])
    back = write_rows(tmp_path / "back.jsonl", [{"prompt": "sun", "response": "moon"}, *_read(pairs)[:3]])
    responses = write_rows(tmp_path / "responses.jsonl", [{"prompt": "sun", "response": "moon"}])
    new = tmp_path / "new.jsonl"
    stopped, resumed, again, *refused = _call(
        world,
        1,
        Call(evaluate, Interruption("scoring", 5, signal.SIGTERM, rank=0)),
        Call(evaluate),
        Call(evaluate),
        Call(_settings("score", world, mixed, new)),
        Call(_settings("score", world, back, new)),
        Call(_settings("evaluate-reward", world, responses, new.with_suffix(".json"))),
        Call(_settings("evaluate-reward", world, pairs, tmp_path / "q.svg")),
    )
    assert stopped.code == 75, stopped.stderr
    assert "rows are kept" in stopped.stderr
    assert resumed.code == 0, resumed.stderr
    assert (tmp_path / "q.scored.jsonl").read_bytes() == (whole / "pairs.jsonl").read_bytes()
    found = json.loads(output.read_text())
    rows = _read(whole / "pairs.jsonl")
    accuracy = sum(row["score_chosen"] > row["score_rejected"] for row in rows) / NUM_ROWS
    assert found["overall"]["accuracy"]["value"] == pytest.approx(accuracy)
    assert list(found["slices"]) == ["group", "chosen length", "characters"]
    assert again.code == 2
    assert f"{output} exists already" in again.stderr
    expected = [
        f"{mixed}:4: a response among pairs {{chosen, rejected}}",
        f"{back}:2: a pair {{chosen, rejected}} among responses",
        f"{responses}:1: a response among pairs {{chosen, rejected}}",
        "must end in .json",
    ]
    for answer, text in zip(refused, expected, strict=True):
        assert answer.code == 2
        assert text in answer.stderr
        assert answer.stderr.count("\n") == 1, answer.stderr
        assert "building reward_model" not in answer.phases
    names = {"q.json", "q.md", "q.svg", "q.scored.jsonl", "mixed.jsonl", "back.jsonl", "responses.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_the_dry_run_names_the_files(
    world: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_gil.cli import main

    assert main([*_settings("evaluate-reward", world, pairs, tmp_path / "q.json"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"scored pairs to {tmp_path / 'q.scored.jsonl'}, numbers to {tmp_path / 'q.json'}" in said
    assert not list(tmp_path.iterdir())
    (tmp_path / "q.scored.jsonl").write_text("")
    assert main([*_settings("evaluate-reward", world, pairs, tmp_path / "q.json"), "--dry-run"]) == 2
    assert f"`megatron-gil evaluate-reward {tmp_path / 'q.scored.jsonl'}` evaluates it" in capsys.readouterr().err
