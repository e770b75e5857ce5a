"""One holder of a lock at a time: living ones are respected, dead ones recognised, on this machine and on others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_gil.config import ConfigError
from megatron_gil.training.run import lock as lock_module
from megatron_gil.training.run.lock import FileLock, Holder
from tests.ranks import PATIENCE_S

HOLD = """
import sys
from pathlib import Path
from megatron_gil.training.run import lock
lock.BEAT_S = 0.1
held = lock.FileLock.take(Path(sys.argv[1]), "x")
print("held", flush=True)
sys.stdin.read()
held.release()
"""


@contextmanager
def _holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock until its stdin ends."""
    command = [sys.executable, "-c", HOLD, str(path)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def _touch(path: Path, silent_s: float) -> None:
    last = time.time() - silent_s
    os.utime(path, (last, last))


def _write(path: Path, holder: Holder, *, silent_s: float = 0.0) -> None:
    path.write_text(json.dumps(asdict(holder)) + "\n")
    _touch(path, silent_s)


def _elsewhere() -> Holder:
    return replace(Holder.here(), host="node7", machine="node7 boot", token="other")


def _take(path: Path) -> FileLock:
    taken = FileLock.take(path, "run.dir=x")
    assert taken is not None
    return taken


def test_a_living_holder_is_respected_and_a_killed_one_succeeded_at_once(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with _holder(path) as process:
        with pytest.raises(ConfigError, match=rf"run.dir=x is in use by process {process.pid} on \S+ since 20.* UTC; "):
            _take(path)
        process.send_signal(signal.SIGKILL)  # and not waited for: it is a zombie, or not even gone
        _take(path).release()
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_process_holds_on(tmp_path: Path) -> None:
    with _holder(tmp_path / "lock") as process:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(ConfigError, match="is in use by process"):
            _take(tmp_path / "lock")


def test_a_released_lock_is_free(tmp_path: Path) -> None:
    with _holder(tmp_path / "lock") as process:
        assert process.communicate("", timeout=PATIENCE_S)[1] == ""
        _take(tmp_path / "lock").release()


def test_a_later_process_of_the_same_id_is_another(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    _write(path, replace(Holder.here(), started="1"))
    taken = _take(path)
    assert json.loads(path.read_text())["started"] != "1"
    with pytest.raises(ConfigError, match="is in use"):
        _take(path)
    taken.release()


def test_another_machines_holder_is_dead_when_its_beat_is_old(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    _write(path, _elsewhere(), silent_s=lock_module.SILENCE_S + 1)
    _take(path).release()
    path.write_bytes(b"")  # killed between making and writing the file
    _touch(path, lock_module.SILENCE_S + 1)
    _take(path).release()
    assert list(tmp_path.iterdir()) == []


def test_a_start_waits_until_another_machine_has_been_silent_long_enough(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lock"
    _write(path, _elsewhere(), silent_s=lock_module.SILENCE_S - 1)
    _take(path).release()
    said = capsys.readouterr().err
    assert "run.dir=x was in use by process" in said
    assert "on node7" in said
    assert said.count("\n") == 1
    _write(path, _elsewhere(), silent_s=0)
    with pytest.raises(ConfigError, match=r"counts as dead only after 120 s; start again then, or remove .*lock if"):
        FileLock.take(path, "run.dir=x", patience_s=0.3)
    assert FileLock.take(path, "run.dir=x", stopping=lambda: True) is None
    assert path.exists()


def test_another_machines_beat_is_a_sign_of_life(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    _write(path, _elsewhere(), silent_s=5)
    beat = threading.Timer(0.5, os.utime, [path])
    beat.start()
    with pytest.raises(ConfigError, match=r"is in use by process .* on node7"):
        _take(path)


def test_of_many_that_find_a_dead_holder_one_takes_over(tmp_path: Path) -> None:
    path, taken, refused = tmp_path / "lock", list[FileLock](), list[str]()
    _write(path, replace(Holder.here(), started="1"))
    together = threading.Barrier(8)

    def start() -> None:
        together.wait()
        try:
            taken.append(_take(path))
        except ConfigError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(refused)) == (1, 7)
    taken[0].release()
    assert list(tmp_path.iterdir()) == []


def test_a_holder_that_was_taken_over_ends_itself(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with _holder(path) as process:
        _write(path, _elsewhere())
        assert process.wait(timeout=PATIENCE_S) == 1
        assert process.stderr is not None
        said = process.stderr.read()
    assert "x was taken over by process" in said
    assert said.count("\n") == 1
    assert json.loads(path.read_text())["host"] == "node7"
