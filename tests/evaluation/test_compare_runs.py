"""tools/compare_runs.py: what counts as the same run, and what it says of two that are not."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import compare_runs


def make_run(directory: Path, *, score: float = 2.0, iterations: int = 3, weight: float = 4.0) -> Path:
    directory.mkdir()
    rows = [
        {"iteration": i, "reward/score_mean": score if i else 1.0, "critic/value_loss": None, "time/iteration_s": id(i)}
        for i in range(iterations)
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, stem in (("policy", "model"), ("policy.optimizer", "optimizer")):
        part = directory / "checkpoints" / "iter_0000002" / name
        part.mkdir(parents=True)
        save_file({"w": torch.tensor([1.0, weight if stem == "optimizer" else 1.0])}, part / f"{stem}.safetensors")
    return directory


@pytest.mark.parametrize(
    ("changes", "tolerance", "code", "said"),
    [
        ({}, 0, 0, "4 metrics and tensors compared, 0 differ"),
        ({"score": 2.02}, 0, 1, "reward/score_mean  from iteration 1  "),
        ({"score": 2.02}, 0.01, 0, "0 differ by more than 0.01"),
        ({"weight": 4.5}, 0.1, 1, "policy.optimizer/w  iter_0000002"),
        ({"weight": 4.5}, 0.2, 0, "0 differ by more than 0.2"),
        ({"weight": float("nan")}, 1e9, 1, "inf"),
        ({"score": float("nan")}, 1e9, 1, "reward/score_mean"),
        ({"iterations": 4}, 0, 1, "iterations that only one of them has: 3"),
    ],
)
def test_two_runs(
    changes: dict[str, float],
    tolerance: float,
    code: int,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = [str(make_run(tmp_path / "a")), str(make_run(tmp_path / "b", **changes))]  # type: ignore[arg-type]
    assert compare_runs.main([*runs, "--tolerance", str(tolerance)]) == code
    assert " ".join(said.split()) in " ".join(capsys.readouterr().out.split())


def test_without_a_shared_checkpoint_metrics_alone_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", weight=9.0)]
    (runs[1] / "checkpoints" / "iter_0000002").rename(runs[1] / "checkpoints" / "iter_0000004")
    assert compare_runs.main([str(run) for run in runs]) == 0
    assert "metrics alone are compared" in capsys.readouterr().out


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(make_run(tmp_path / "a"))
    assert compare_runs.main([run, str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"compare_runs: {tmp_path}: no metrics.jsonl, so this is no run directory\n"
