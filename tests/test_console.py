"""Ctrl-C, a reader that has gone, a full disk under the output: one line or none, and nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_gil.cli import main
from tests.evaluation.test_report import make_run
from tests.faults.running import NUM_ITERATIONS, arguments
from tests.planning.test_dry_run import ppo
from tests.ranks import PATIENCE_S
from tests.world import write_rows

ROOT = Path(__file__).parents[1]


def _commands(world: Path, tmp_path: Path) -> dict[str, tuple[Callable[[list[str]], int], list[str], str]]:
    """name -> (main, arguments, a function that it calls in the middle)."""
    responses = str(write_rows(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r", "score": 1.0}]))
    make_run(tmp_path / "run", num_groups=1)
    output = str(tmp_path / "out" / "file")
    (tmp_path / "out").mkdir()
    data = ["jsonl", "--input", str(world / "demonstrations.jsonl"), "--output", output]
    return {
        "plan": (main, ["plan"], "commands.plan.find_plans"),
        "report": (main, ["report", str(tmp_path / "run"), "--output", output], "paths.os.fsync"),
        "evaluate": (main, ["evaluate", responses, responses, "--output", f"{output}.json"], "paths.os.fsync"),
        "sft": (main, [*ppo(world), "--dry-run"], "commands.dry_run.rank_memory"),
        "demo": (main, ["demo", "--quick", "--output", output], "demo.world.write_tiny_llama"),
        "prepare-data": (main, ["prepare-data", *data], "data.prepare.split.write_card"),
        "convert": (
            main,
            ["convert", "import", str(world / "policy"), output],
            "models.convert.copy.shutil.copyfile",
        ),
    }


@pytest.mark.parametrize("name", ["plan", "report", "evaluate", "sft", "demo", "prepare-data", "convert"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_is_one_line_and_leaves_nothing(
    name: str, number: signal.Signals, world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command, given, place = _commands(world, tmp_path)[name]

    def interrupt(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), number)

    with mock.patch(f"megatron_gil.{place}", interrupt):
        code = command(given)
    said = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    if name == "demo":
        assert code == {signal.SIGINT: 130, signal.SIGHUP: 75}[number]
        assert "goes on from here" in said[-1]
        assert not (tmp_path / "out" / "file" / "demo.json").exists()
    else:
        assert code == 128 + number
        assert len(said) == 1
        assert f"stopped by {number.name}" in said[0]
        assert left == []
    assert not (tmp_path / "out" / ".file.tmp").exists()


def _run(given: list[str], world: Path, shell: str = "", **options: Any) -> subprocess.Popen[str]:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(world / "cache"), "PYTHONPATH": str(ROOT)
    }  # fmt: skip
    command = [sys.executable, "-m", "megatron_gil", *given]
    if shell:
        command = ["sh", "-c", f'exec "$@" {shell}', "sh", *command]
    return subprocess.Popen(command, text=True, env=environment, **options)


@pytest.mark.parametrize("given", [["plan"], ["--help"], ["report", "--help"]])
def test_a_reader_that_has_gone_is_no_error_and_a_full_disk_one_line(given: list[str], world: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    gone = _run(given, world, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    full = _run(given, world, "> /dev/full", stderr=subprocess.PIPE)
    closed = _run(given, world, ">&-", stderr=subprocess.PIPE)
    assert (gone.communicate(timeout=PATIENCE_S)[1], gone.returncode) == ("", 141)
    said = full.communicate(timeout=PATIENCE_S)[1]
    assert full.returncode == 1
    assert said.endswith("standard output cannot be written: No space left on device\n")
    assert said.count("\n") == 1
    assert (closed.communicate(timeout=PATIENCE_S)[1], closed.returncode) == ("", 0)


@pytest.mark.parametrize("shell", ["> /dev/full 2> /dev/full", ">&- 2>&-", "2>&1 | true"])
def test_training_goes_on_whatever_becomes_of_its_output(shell: str, world: Path, tmp_path: Path) -> None:
    given = [*arguments("sft", world, tmp_path / "run")]
    if "|" in shell:
        reader, writer = os.pipe()
        os.close(reader)
        process = _run(given, world, stdout=writer, stderr=writer)
        os.close(writer)
    else:
        process = _run(given, world, shell)
    assert process.wait(timeout=PATIENCE_S) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().split("\n") if line]
    assert [row["iteration"] for row in rows] == list(range(NUM_ITERATIONS))
