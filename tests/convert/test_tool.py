"""`megatron-gil convert` as a user runs it, by both of its names: exit codes, one line, signals."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_gil.engine.files import digest, write_manifest
from tests.convert.directories import assert_equal_bits, copy_as, edit_config, files_under, read_tensors
from tests.ranks import PATIENCE_S

ROOT = Path(__file__).parents[2]
COMMAND = ("-m", "megatron_gil", "convert")
DOOR = ("tools/convert_hf.py",)


def _run(*arguments: object, by: tuple[str, ...] = COMMAND) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *by, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("by", [COMMAND, DOOR], ids=["command", "tool"])
def test_in_and_out(by: tuple[str, ...], world: Path, tmp_path: Path) -> None:
    done = _run("import", world / "policy", tmp_path / "imported", by=by)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{world / 'policy'} -> {tmp_path / 'imported'}: 21 tensors, ")
    done = _run(
        "export", tmp_path / "imported", tmp_path / "exported", "--role", "policy", "--dtype", "bfloat16", by=by
    )
    assert (done.returncode, done.stderr) == (0, "")
    expected = {name: tensor.bfloat16() for name, tensor in read_tensors(world / "policy").items()}
    assert_equal_bits(read_tensors(tmp_path / "exported"), expected)


def test_what_is_wrong_is_one_line_and_exit_code_2(world: Path, tmp_path: Path) -> None:
    source = copy_as(world / "policy", tmp_path / "source")
    edit_config(source, model_type="gemma3")
    done = _run("import", source, tmp_path / "imported")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"megatron-gil convert import: {source / 'config.json'}: model_type is 'gemma3'")
    assert done.stderr.count("\n") == 1
    assert files_under(tmp_path) == ["source"]


def test_neither_import_nor_export_loads_torch() -> None:
    check = "import sys, megatron_gil.commands.convert; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0


# The copy of the weights announces itself and then takes for ever.
SLOW = """
import shutil, sys, time
from megatron_gil.cli import main
from megatron_gil.models.convert import copy

def copyfile(source, target):
    target.write_bytes(b"half a file")
    print("copying", flush=True)
    time.sleep(3600)

def read_slowly(source, target, expected, stopped):
    target.write_bytes(b"half a file")
    print("copying", flush=True)
    stopped.wait()

copy.shutil.copyfile, copy._copy_proven = copyfile, read_slowly
sys.exit(main(["convert", *sys.argv[1:]]))
"""


def _interrupt(source: Path, tmp_path: Path, number: int, action: str = "import") -> int:
    command = [sys.executable, "-c", SLOW, action, str(source), str(tmp_path / "imported")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "copying\n"
    process.send_signal(number)
    process.wait(timeout=PATIENCE_S)
    process.stdout.close()
    return process.returncode


def test_a_stopped_conversion_leaves_nothing(world: Path, tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        assert _interrupt(world / "policy", tmp_path, number) != 0
        assert files_under(tmp_path) == []


def test_a_stopped_export_of_a_checkpoint_leaves_nothing(world: Path, tmp_path: Path) -> None:
    """Whose files are copied by threads."""
    checkpoint = tmp_path / "run/iter_0000001"
    shutil.copytree(world / "policy", checkpoint / "policy")
    write_manifest(checkpoint, {str(p.relative_to(checkpoint)): digest(p) for p in checkpoint.glob("policy/*")})
    for number in (signal.SIGTERM, signal.SIGINT):
        assert _interrupt(checkpoint, tmp_path, number, "export") != 0
        assert files_under(tmp_path) == ["run"]


def test_after_a_kill_nothing_has_the_name_and_the_next_one_clears_up(world: Path, tmp_path: Path) -> None:
    assert _interrupt(world / "policy", tmp_path, signal.SIGKILL) == -signal.SIGKILL
    assert files_under(tmp_path) == [".imported.tmp"]
    assert _run("import", world / "policy", tmp_path / "imported").returncode == 0
    assert files_under(tmp_path) == ["imported"]
    assert_equal_bits(read_tensors(tmp_path / "imported"), read_tensors(world / "policy"))
