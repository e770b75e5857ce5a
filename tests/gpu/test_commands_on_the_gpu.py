"""Whole commands on a GPU: resumed to the last bit, taken over by the CPU, and out of memory in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.gpu.compare import apart
from tests.gpu.processes import compare_runs, ppo_arguments, start, write_long_world

pytestmark = pytest.mark.gpu

LAST, STOPPED = "iter_0000004", "iter_0000002"
LITTLE_MIB = 512


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was not stopped."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    done = start("cuda", "megatron_gil", *ppo_arguments(world, run, "run.deterministic=true"))
    assert done.returncode == 0, done.stderr[-3000:]
    return run


def _stopped(whole: Path, run: Path) -> Path:
    """As the run was when its second iteration was saved; what is logged of later ones, a resume takes out."""
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / LAST)
    return run


def test_a_checkpoint_resumes_to_the_last_bit(world: Path, whole: Path, tmp_path: Path) -> None:
    run = _stopped(whole, tmp_path / "resumed")
    done = start("cuda", "megatron_gil", *ppo_arguments(world, run, "run.deterministic=true"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "at iteration 2 of 4" in done.stderr
    compared = compare_runs(whole, run)
    assert compared.returncode == 0, compared.stdout + compared.stderr


def test_models_that_wait_on_the_host_change_nothing(world: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "offload"
    done = start("cuda", "megatron_gil", *ppo_arguments(world, run, "run.deterministic=true", "models.offload=all"))
    assert done.returncode == 0, done.stderr[-3000:]
    compared = compare_runs(whole, run)
    assert compared.returncode == 0, compared.stdout + compared.stderr


def test_a_checkpoint_goes_on_on_the_cpu(world: Path, whole: Path, tmp_path: Path) -> None:
    run = _stopped(whole, tmp_path / "on_the_cpu")
    done = start("cpu", "megatron_gil", *ppo_arguments(world, run, "run.deterministic=true"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "at iteration 2 of 4" in done.stderr
    for role in ("policy", "critic"):
        ours, theirs = (load_file(r / "checkpoints" / LAST / role / "model.safetensors") for r in (run, whole))
        assert apart(ours, theirs, 1e-4) == [], role
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in metrics] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("ppo", ["out of memory in rollout, 64 rows", "lower sampling.micro_size=64 or sampling.max_new_tokens"]),
        ("sft", ["out of memory in policy update, ", "lower batch.micro_size=64, set models.recompute=full"]),
    ],
)
def test_out_of_memory_is_one_line(command: str, expected: list[str], world: Path, tmp_path: Path) -> None:
    place = write_long_world(world, tmp_path)
    common = [
        f"run.dir={place / 'run'}",
        f"models.policy={place / 'policy'}",
        "batch.global_size=64",
        "log.tensorboard=false",
    ]
    own = {
        "ppo": [
            f"models.reward_model={place / 'reward_model'}",
            f"data.train={place / 'prompts.jsonl'}",
            "ppo.prompts=64",
            "sampling.max_new_tokens=8000",  # 64 rows of cache: 2 GiB
            "sampling.micro_size=64",
        ],
        "sft": [
            f"data.train={place / 'demonstrations.jsonl'}",
            "data.max_tokens=4000",
            "batch.micro_size=64",  # their logits: 1 GiB, and as much again for each use
        ],
    }[command]
    done = start("cuda", "tests.gpu.little_memory", LITTLE_MIB, command, *common, *own)
    said = [line for line in done.stderr.splitlines() if "out of memory" in line]
    assert done.returncode == 1, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert len(said) == 1, done.stderr[-3000:]
    for text in (f"megatron-gil {command}: rank 0: ", *expected):
        assert text in said[0]
