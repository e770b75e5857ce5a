"""The checked copies of data files: shared while they are read, removed by the last reader, refused in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from megatron_gil.config import ConfigError
from megatron_gil.data.rows.records import read_records
from tests.ranks import PATIENCE_S
from tests.world import write_rows

READ = """
import sys
from megatron_gil.data.rows.records import read_records
records = read_records(sys.argv[1], "prompts")
print(len(records), records[1]["prompt"], flush=True)
sys.stdin.read()
print(records[0]["prompt"])
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where copies lie in this test."""
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", "/dev/null/unwritable")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "tmp").mkdir()
    return tmp_path / "tmp" / f"megatron_gil-{os.getuid()}"


def _rows(path: Path, text: str) -> Path:
    return write_rows(path, [{"prompt": f"{text} {i}"} for i in range(3)])


def _start(path: Path) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", READ, str(path)], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("3 ")
    return process


def test_the_last_reader_removes_a_copy(root: Path, tmp_path: Path) -> None:
    path = _rows(tmp_path / "a.jsonl", "a")
    first, second = read_records(path, "prompts"), read_records(path, "prompts")
    assert len(list(root.glob("*.lock"))) == 1
    copies = list(root.rglob("*.arrow"))
    assert len(copies) == 1
    del first
    assert copies[0].exists()
    assert second["prompt"] == ["a 0", "a 1", "a 2"]
    del second
    assert list(root.iterdir()) == []


def test_what_a_killed_reader_leaves_goes_with_the_next_start(root: Path, tmp_path: Path) -> None:
    killed, living = _start(_rows(tmp_path / "a.jsonl", "a")), _start(_rows(tmp_path / "b.jsonl", "b"))
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert len(list(root.rglob("*.arrow"))) == 2
    records = read_records(_rows(tmp_path / "c.jsonl", "c"), "prompts")
    assert len(list(root.rglob("*.arrow"))) == 2
    assert living.communicate("", timeout=PATIENCE_S) == ("b 0\n", "")
    assert len(list(root.rglob("*.arrow"))) == 1
    assert records[2]["prompt"] == "c 2"


def test_a_directory_named_by_the_user_is_kept(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "kept"))
    records = read_records(_rows(tmp_path / "a.jsonl", "a"), "prompts")
    del records
    assert len(list((tmp_path / "kept").rglob("*.arrow"))) == 1
    assert not root.exists()


def test_a_place_that_takes_no_copy_is_named(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _rows(tmp_path / "a.jsonl", "a")
    root.write_text("in the way")
    with pytest.raises(
        ConfigError, match=r"megatron_gil-\d+: no checked copy of the data can be written \(.*TMPDIR or"
    ):
        read_records(path, "prompts")
    monkeypatch.setenv("HF_DATASETS_CACHE", "/dev/null/nowhere")
    with pytest.raises(ConfigError, match=r"a\.jsonl: /dev/null/nowhere: no checked copy .*\(Not a directory\)"):
        read_records(path, "prompts")


def test_a_full_disk_is_one_line(root: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "large.jsonl", [{"prompt": "x" * 5000 + str(i)} for i in range(200)])
    command = ["sh", "-c", 'ulimit -f 200; exec "$@"', "sh", sys.executable, "-c", READ, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert "ConfigError" in done.stderr.splitlines()[-1]
    assert "no checked copy of the data can be written (" in done.stderr.splitlines()[-1]
    assert list(root.iterdir()) == []
