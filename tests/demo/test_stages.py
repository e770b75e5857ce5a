"""Stages on real processes: what they share, in which order they come, and what is left when one ends badly."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from megatron_gil import cli
from megatron_gil.console import Interrupted, leaving_on_signals
from megatron_gil.demo.stages import Runner, Stage, StageFailed
from tests.ranks import run_ranks

WORKER = [str(Path(__file__).with_name("answering.py"))]


@pytest.fixture(autouse=True)
def project_for_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


def _stage(root: Path, name: str, act: str = "write", *needs: str) -> Stage:
    product = root / f"{name.replace(' ', '_')}.txt"
    return Stage(name=name, arguments=[act, str(product)], product=product, needs=needs)


def _runner(root: Path, *, workers: int = 2) -> Runner:
    return Runner(root / "logs", worker=WORKER, workers=workers, show=lambda stage, done: None)


def _read(stage: Stage) -> tuple[int, float]:
    """(the process that ran it, when)."""
    process, seconds = stage.product.read_text().split()
    return int(process), float(seconds)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_one_process_does_what_five_did(tmp_path: Path) -> None:
    stages = [_stage(tmp_path, f"stage {i}") for i in range(5)]
    assert _runner(tmp_path, workers=1).run_all(stages) == []
    found = [_read(stage) for stage in stages]
    assert len({process for process, _ in found}) == 1
    assert [seconds for _, seconds in found] == sorted(seconds for _, seconds in found)
    assert not _runs(found[0][0])
    for stage in stages:  # each has its own log
        log = tmp_path / "logs" / f"{stage.name.replace(' ', '_')}.log"
        assert log.read_text() == f"write {stage.product.name}\n"


def test_stages_wait_for_what_they_need(tmp_path: Path) -> None:
    last = _stage(tmp_path, "last", "write", "first", "second")
    first, second = _stage(tmp_path, "first"), _stage(tmp_path, "second", "write", "first")
    _runner(tmp_path).run_all([last, second, first])
    assert _read(first)[1] < _read(second)[1] < _read(last)[1]


def test_what_has_finished_is_shown_and_starts_no_process(tmp_path: Path) -> None:
    stage, shown = _stage(tmp_path, "done"), list[int]()
    stage.product.write_text("as it was")
    Runner(tmp_path / "logs", worker=["-c", "raise"], workers=2, show=lambda _, done: shown.append(done)).run_all(
        [stage]
    )
    assert (stage.product.read_text(), shown) == ("as it was", [0, 1])


def test_a_stage_that_fails_ends_the_others_which_save(tmp_path: Path) -> None:
    waiting = _stage(tmp_path, "waits", "wait")
    never = _stage(tmp_path, "never", "write", "fails")
    with pytest.raises(StageFailed, match=r"fails ended with exit code 3; its output is in .*fails\.log"):
        _runner(tmp_path).run_all([waiting, _stage(tmp_path, "fails", "fail"), never])
    began, saved = (waiting.product.with_suffix(suffix).exists() for suffix in (".began", ".saved"))
    assert began == saved  # the signal may have come before it began
    assert not never.product.exists()


def test_a_process_that_is_killed_is_a_stage_that_failed(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="dies ended with exit code -9"):
        _runner(tmp_path).run_all([_stage(tmp_path, "dies", "die")])


def test_a_process_that_cannot_start_says_why_in_the_log(tmp_path: Path) -> None:
    runner = Runner(tmp_path / "logs", worker=["-c", "import no_such"], workers=1, show=lambda stage, done: None)
    with pytest.raises(StageFailed, match=r"exit code 1; its output is in .*early\.log"):
        runner.run_all([_stage(tmp_path, "early")])
    assert "No module named 'no_such'" in (tmp_path / "logs" / "early.log").read_text()


def test_those_that_keep_going_have_a_new_process_after_a_failure(tmp_path: Path) -> None:
    acts = ["write", "fail", "write", "die", "write"]
    stages = [_stage(tmp_path, f"stage {i}", act) for i, act in enumerate(acts)]
    failures = _runner(tmp_path, workers=1).run_all(stages, keep_going=True)
    assert [str(failure).split(";")[0] for failure in failures] == [
        "stage 1 ended with exit code 3",
        "stage 3 ended with exit code -9",
    ]
    assert len({_read(stages[i])[0] for i in (0, 2, 4)}) == 3


def test_a_signal_to_the_caller_lets_every_stage_save(tmp_path: Path) -> None:
    waiting = [_stage(tmp_path, f"waits {i}", "wait") for i in range(2)]

    def interrupt() -> None:
        while not all(stage.product.with_suffix(".began").exists() for stage in waiting):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    runner = _runner(tmp_path)
    threading.Thread(target=interrupt).start()
    with leaving_on_signals(), pytest.raises(Interrupted):
        runner.run_all([*waiting, _stage(tmp_path, "never")])
    assert all(stage.product.with_suffix(".saved").exists() for stage in waiting)
    assert not (tmp_path / "never.txt").exists()


def test_commands_in_one_process_give_what_each_gives_alone(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training, sampling and scoring in one worker of the demo; the last two again, the other way round, in another
    process. Bit for bit."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(world / "cache"))
    limits = ["data.max_tokens=48", "data.max_prompt_tokens=32"]
    model = tmp_path / "run" / "checkpoints" / "iter_0000002" / "policy"
    answers, scores = tmp_path / "answers.jsonl", tmp_path / "scores.jsonl"
    train = ["sft", f"run.dir={tmp_path / 'run'}", f"models.policy={world / 'policy'}", "train.updates=2", *limits]
    train += [f"data.train={world / 'demonstrations.jsonl'}", "batch.global_size=8", "batch.micro_size=8"]
    generate = ["generate", f"models.policy={model}", f"data.train={world / 'prompts.jsonl'}", limits[1]]
    generate += ["sampling.max_new_tokens=6"]
    score = ["score", f"models.reward_model={world / 'reward_model'}", f"data.train={answers}", *limits]
    stages = [
        Stage(name="sft", arguments=train, product=model),
        Stage(name="answers", arguments=[*generate, f"output={answers}"], product=answers, needs=["sft"]),
        Stage(name="scores", arguments=[*score, f"output={scores}"], product=scores, needs=["answers"]),
    ]
    worker = ["-m", "megatron_gil.demo.worker"]
    Runner(tmp_path / "logs", worker=worker, workers=1, show=lambda stage, done: None).run_all(stages)
    again = {product: product.with_suffix(".again.jsonl") for product in (answers, scores)}
    commands = [[*score, f"output={again[scores]}"], [*generate, f"output={again[answers]}"]]
    assert run_ranks(_call, 1, commands) == [[0, 0]]
    for product, other in again.items():
        assert other.read_bytes() == product.read_bytes()


def _call(commands: list[list[str]]) -> list[int]:
    return [cli.main(arguments) for arguments in commands]
