"""tools/bench.py gpu, tried out on the CPU: every measurement is taken once, written down, and not taken again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import PATIENCE_S

ROOT = Path(__file__).parents[1]
NAMES = ["ceilings", "tiny train", "tiny score", "tiny decode", "tiny iteration"]


def _bench(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    files = ["--json", str(place / "results.json"), "--markdown", str(place / "results.md")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tools/bench.py"), "gpu", *files, *arguments]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bench")
    done = _bench(place, "--device", "cpu")
    assert (done.returncode, done.stderr) == (0, "")
    return place


def test_everything_is_measured_and_said(measured: Path) -> None:
    results = json.loads((measured / "results.json").read_text())
    assert list(results["measured"]) == NAMES
    assert results["machine"]["device"] == "cpu"
    assert {"commit", "torch", "megatron-core", "python", "name"} <= results["machine"].keys()
    found = {name: results["measured"][name] for name in NAMES}
    for name in ("tiny train", "tiny score", "tiny decode"):
        rate = found[name]["tokens_per_s"]
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]
    iteration = found["tiny iteration"]
    parts = sum(iteration[part]["median"] for part in ("rollout", "score", "update"))
    assert parts == pytest.approx(iteration["seconds"]["median"], rel=0.5)
    assert (iteration["planned_bytes"] > 0, iteration["peak_bytes"]) == (True, None)
    page = (measured / "results.md").read_text()
    for text in ("# A trial on the CPU", "| trained |", "| scored |", "| decoded |", "| PPO-GIL iteration |"):
        assert text in page


def test_a_run_that_was_ended_goes_on_with_what_is_missing(measured: Path) -> None:
    file = measured / "results.json"
    before = json.loads(file.read_text())
    cut = {**before, "tests": {"tests/gpu/test_x.py::test_y": "failed", "tests/gpu/test_x.py::test_z": "passed"}}
    cut["measured"] = {name: entry for name, entry in before["measured"].items() if name != "tiny score"}
    file.write_text(json.dumps(cut))
    done = _bench(measured, "--device", "cpu", "--resume")
    assert (done.returncode, done.stderr) == (0, "")
    after = json.loads(file.read_text())
    assert after["measured"].pop("tiny score").keys() == before["measured"].pop("tiny score").keys()
    assert after == {**cut, "measured": before["measured"]}
    page = (measured / "results.md").read_text()
    assert "tests/gpu: 1 passed, 1 failed.\n- failed: tests/gpu/test_x.py::test_y\n" in page


def test_what_it_cannot_do_is_one_line(tmp_path: Path) -> None:
    for arguments, expected in (
        (("--device", "cuda"), "bench gpu: --device cuda: no CUDA device; --device cpu tries the script\n"),
        (("--shapes", "7b"), "bench gpu: --shapes 7b is not one of 160m, 1.3b, 3b, tiny\n"),
    ):
        done = _bench(tmp_path, *arguments)
        assert (done.returncode, done.stderr) == (2, expected)
    assert not list(tmp_path.iterdir())
