"""generate and score lose no answer to a stop, a kill or a full disk, and end in the file of a run never stopped."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.faults.processes import Ranks, SignalAt
from tests.faults.running import Call, Interruption, call_all
from tests.ranks import run_ranks
from tests.world import write_rows

NUM_ROWS = 24
LIMITS = ("data.max_prompt_tokens=32", "data.max_tokens=48")


def _generate(world: Path, output: Path, *more: str) -> list[str]:
    """12 rows on each of two ranks, in batches of four fillings of one slot."""
    fixed = [f"models.policy={world / 'policy'}", f"data.train={world / 'prompts.jsonl'}", f"output={output}"]
    return [
        "generate",
        *fixed,
        "batch.micro_size=2",
        "sampling.max_new_tokens=6",
        "sampling.micro_size=1",
        *LIMITS,
        *more,
    ]


def _score(world: Path, responses: Path, output: Path, *more: str) -> list[str]:
    fixed = [f"models.reward_model={world / 'reward_model'}", f"data.train={responses}", f"output={output}"]
    return ["score", *fixed, "batch.micro_size=2", *LIMITS, *more]


@pytest.fixture(scope="module")
def wholes(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What generate and score write when nothing stops them, on two ranks."""
    directory = tmp_path_factory.mktemp("whole")
    responses, scores = directory / "responses.jsonl", directory / "scores.jsonl"
    answers = run_ranks(call_all, 2, [Call(_generate(world, responses)), Call(_score(world, responses, scores))], world)
    assert [answer.code for answer in answers[0]] == [0, 0], answers[0]
    assert f"{NUM_ROWS} rows in {responses}" in answers[0][0].stderr
    assert sorted(path.name for path in directory.iterdir()) == ["responses.jsonl", "scores.jsonl"]
    return responses, scores


def _kept(output: Path) -> int:
    """Rows in the file beside `output`."""
    lines = output.with_name(f"{output.name}.part").read_text(encoding="utf-8").split("\n")[1:-1]
    return sum(len(json.loads(line)["rows"]) for line in lines)


def test_a_stopped_command_goes_on_with_what_is_not_answered(
    world: Path, wholes: tuple[Path, Path], tmp_path: Path
) -> None:
    output, scores = tmp_path / "responses.jsonl", tmp_path / "scores.jsonl"
    generate, score = _generate(world, output), _score(world, wholes[0], scores)
    stopped, resumed, stopped_score, resumed_score = run_ranks(
        call_all,
        2,
        [
            Call(generate, Interruption("rollout", 10, signal.SIGTERM, rank=1)),
            Call(generate),
            Call(score, Interruption("scoring", 7, signal.SIGUSR1, rank=0)),
            Call(score),
        ],
        world,
    )[0]
    assert (stopped.code, resumed.code, stopped_score.code, resumed_score.code) == (75, 0, 75, 0), stopped.stderr
    # the thread that listens may hear of the signal a batch later
    assert re.search(rf"stopped by SIGTERM in rollout; (8|16) of 24 rows are kept in {output}\.part", stopped.stderr)
    assert re.search(rf"{output}\.part: (8|16) of 24 rows are there", resumed.stderr)
    assert resumed.phases.count("rollout") <= 12, "of three batches at six each, one was there"
    assert "rows are kept" in stopped_score.stderr
    assert output.read_bytes() == wholes[0].read_bytes()
    assert scores.read_bytes() == wholes[1].read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["responses.jsonl", "scores.jsonl"]


def test_after_kill_9_the_rows_that_were_written_are_there(
    world: Path, wholes: tuple[Path, Path], tmp_path: Path
) -> None:
    output = tmp_path / "responses.jsonl"
    kill = SignalAt("engine.generation.Generator.sample", 3, victims=(0, 1))
    codes = Ranks(_generate(world, output), world, tmp_path / "log", change=kill).wait()
    assert codes == [-signal.SIGKILL, -signal.SIGKILL]
    assert not output.exists()
    assert _kept(output) == 16
    part = output.with_name("responses.jsonl.part")
    part.write_bytes(part.read_bytes()[:-7])  # as a kill in the middle of a write leaves it
    codes = Ranks(_generate(world, output), world, tmp_path / "again").wait()
    assert codes == [0, 0]
    assert "8 of 24 rows are there" in (tmp_path / "again.0").read_text()
    assert output.read_bytes() == wholes[0].read_bytes()
    assert not part.exists()


def test_a_part_of_something_else_is_refused_in_one_line(world: Path, tmp_path: Path) -> None:
    output, part = tmp_path / "responses.jsonl", tmp_path / "responses.jsonl.part"
    rows = [{"prompt": "sun"}, {"prompt": "moon"}, *({"prompt": f"sea {i}"} for i in range(10))]
    prompts = write_rows(tmp_path / "prompts.jsonl", rows)  # many: the stop is heard some rows later
    generate = _generate(world, output, f"data.train={prompts}", "sampling.micro_size=1")
    stop = Interruption("rollout", 3, signal.SIGTERM, rank=0)
    (stopped,) = run_ranks(call_all, 1, [Call(generate, stop)], world)[0]
    assert stopped.code == 75, stopped.stderr
    kept = part.read_bytes()
    cases = {
        "sampling.temperature=0.5": "sampling.temperature was 1.0 and is 0.5",
        f"models.policy={world / 'other'}": "models.policy was",
        "run.seed=2": "run.seed was 1 and is 2",
    }
    answers = run_ranks(call_all, 1, [Call([*generate, change]) for change in cases], world)[0]
    for answer, expected in zip(answers, cases.values(), strict=True):
        assert answer.code == 2
        assert answer.stderr.count("\n") == 1, answer.stderr
        assert expected in answer.stderr
        assert f"delete {part} to begin anew" in answer.stderr
        assert part.read_bytes() == kept
    write_rows(prompts, [*rows[:-1], {"prompt": "stone"}])
    (answer,) = run_ranks(call_all, 1, [Call(generate)], world)[0]
    assert answer.code == 2
    assert "the files of data.train have changed" in answer.stderr
    part.write_text("precious\n")
    (answer,) = run_ranks(call_all, 1, [Call(generate)], world)[0]
    assert answer.code == 2
    assert "is not a part of an earlier generate" in answer.stderr
    assert part.read_text() == "precious\n"


def test_rows_in_memory_may_change_between_starts(world: Path, wholes: tuple[Path, Path], tmp_path: Path) -> None:
    """What one lowers after running out of memory, and another layout: the rows that are there stay."""
    output = tmp_path / "responses.jsonl"
    stop = Interruption("rollout", 10, signal.SIGTERM, rank=0)
    assert run_ranks(call_all, 2, [Call(_generate(world, output), stop)], world)[0][0].code == 75
    (resumed,) = run_ranks(call_all, 1, [Call(_generate(world, output, "sampling.micro_size=3"))], world)[0]
    assert resumed.code == 0, resumed.stderr
    assert re.search(r"\b(8|16) of 24 rows are there", resumed.stderr)
    assert output.read_bytes() == wholes[0].read_bytes()  # float32, far from ties: no token hangs on the last bit


def _call_with_full_disk(call: Call, root: Path) -> int:
    full, write, calls = OSError(28, "No space left on device"), os.pwrite, itertools.count(1)

    def pwrite(*arguments: Any) -> int:
        if next(calls) > 2:  # the first line, one batch
            raise full
        return write(*arguments)

    with mock.patch("megatron_gil.training.run.row_file.os.pwrite", pwrite):
        return call_all([call], root)[0].code


def test_a_full_disk_ends_it_in_one_line(world: Path, tmp_path: Path) -> None:
    call = Call(_generate(world, tmp_path / "responses.jsonl"))
    assert run_ranks(_call_with_full_disk, 2, call, world) == [1, 1]
    assert not (tmp_path / "responses.jsonl").exists()
    assert _kept(tmp_path / "responses.jsonl") == 8


def _call_with_lines(calls: list[Call], root: Path) -> list[str]:
    with mock.patch("megatron_gil.training.run.answers.LINE_EVERY_S", 0.0):
        return [answer.stderr for answer in call_all(calls, root)]


def test_a_log_gets_a_line_every_so_often(world: Path, tmp_path: Path) -> None:
    output = tmp_path / "responses.jsonl"
    (said,) = run_ranks(_call_with_lines, 1, [Call(_generate(world, output, "sampling.micro_size=2"))], world)[0]
    assert " 8/24 rows" in said
    assert "16/24 rows" in said
    assert "rows/s  left 0:0" in said


def test_two_at_a_time_are_refused(world: Path, tmp_path: Path) -> None:
    output = tmp_path / "responses.jsonl"
    freeze = SignalAt("engine.generation.Generator.sample", 2, victims=(0,), number=signal.SIGSTOP)
    first = Ranks(_generate(world, output), world, tmp_path / "first", world_size=1, change=freeze)
    while not output.with_name("responses.jsonl.part").exists():
        first.processes[0].join(0.1)
    (second,) = run_ranks(call_all, 1, [Call(_generate(world, output))], world)[0]
    first.kill()
    assert second.code == 2
    assert "is in use by process" in second.stderr


def test_a_name_that_no_command_reads_is_refused_at_once(world: Path, tmp_path: Path) -> None:
    (answer,) = run_ranks(call_all, 1, [Call(_generate(world, tmp_path / "answers.out"))], world)[0]
    assert answer.code == 2
    assert answer.stderr.endswith("answers.out must end in .jsonl: that is what it holds, and what score reads\n")
    assert "building policy" not in answer.phases
