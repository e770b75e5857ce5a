"""Two starts in one run directory or for one output: the second is refused, unless the first is dead."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from unittest import mock

from tests.faults.processes import Ranks
from tests.faults.running import arguments, check_equal
from tests.ranks import PATIENCE_S


class WaitForEver:
    """No rank gets beyond a function of the package."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, rank: int) -> None:
        def wait(*_: Any, **__: Any) -> None:
            time.sleep(600)

        mock.patch(f"megatron_gil.{self.name}", wait).start()


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def _refused(command: list[str], world: Path, log: Path) -> str:
    """What a start says that is refused; on one rank, whatever the first one has."""
    second = Ranks(command, world, log, world_size=1)
    assert second.wait() == [2], second.said(0)
    assert second.said(0).count("\n") == 1, second.said(0)
    return second.said(0)


def test_a_second_start_in_a_run_directory(world: Path, tmp_path: Path) -> None:
    run, whole = (arguments("sft", world, tmp_path / name) for name in ("run", "whole"))
    first = Ranks(run, world, tmp_path / "first", change=WaitForEver("engine.megatron.TrainableModel.update"))
    _wait_for(tmp_path / "run" / "metrics.jsonl")
    said = _refused(run, world, tmp_path / "second")
    assert f"run.dir={tmp_path / 'run'} is in use by process {first.processes[0].pid} on " in said
    first.kill()  # -9, and started again at once
    third = Ranks(run, world, tmp_path / "third")
    assert third.wait() == [0, 0], third.said(0)
    assert Ranks(whole, world, tmp_path / "fourth").wait() == [0, 0]
    check_equal(tmp_path / "run", tmp_path / "whole")
    assert not list((tmp_path / "run").glob("run.lock*"))


def test_a_second_writer_of_an_output(world: Path, tmp_path: Path) -> None:
    output = tmp_path / "responses.jsonl"
    command = ["generate", f"models.policy={world / 'policy'}", f"data.train={world / 'prompts.jsonl'}"]
    command += ["sampling.max_new_tokens=4", "data.max_prompt_tokens=32", f"output={output}"]
    first = Ranks(command, world, tmp_path / "first", change=WaitForEver("engine.generation.Generator.sample"))
    _wait_for(tmp_path / ".responses.jsonl.lock")
    assert f"output={output} is in use by process " in _refused(command, world, tmp_path / "second")
    first.kill()
    third = Ranks(command, world, tmp_path / "third")
    assert third.wait() == [0, 0], third.said(0)
    assert len([json.loads(line) for line in output.read_text().splitlines()]) == 24
    assert not list(tmp_path.glob("*.lock"))
