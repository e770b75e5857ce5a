"""Where a process finds itself: torchrun's environment, srun's, or none; and the groups that follow."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gil.config import ConfigError, ParallelSection
from megatron_gil.parallel import layout as layout_module
from megatron_gil.parallel.cpu import install_cpu_shim
from megatron_gil.parallel.layout import read_world_size, start_parallel, stop_parallel
from tests.ranks import run_ranks

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [*LAUNCHER, *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def _set(env: pytest.MonkeyPatch, **values: str) -> None:
    for name, value in values.items():
        env.setenv(name, value)


def test_world_size_from_the_environment(env: pytest.MonkeyPatch) -> None:
    assert read_world_size() == 1
    _set(env, SLURM_PROCID="3", SLURM_NTASKS="8", SLURM_LOCALID="1", MASTER_ADDR="n1")
    assert read_world_size() == 8
    _set(env, RANK="0", WORLD_SIZE="4", LOCAL_RANK="0", MASTER_PORT="4000")  # torchrun inside a Slurm job
    assert read_world_size() == 4


def test_a_batch_script_of_one_task_is_alone(env: pytest.MonkeyPatch) -> None:
    _set(env, SLURM_PROCID="0", SLURM_NTASKS="1", SLURM_JOB_ID="7")
    assert layout_module._read_place(os.environ).store is None


def test_a_number_that_is_none_is_named(env: pytest.MonkeyPatch) -> None:
    _set(env, RANK="0", WORLD_SIZE="two")
    with pytest.raises(ConfigError, match="WORLD_SIZE='two'"):
        read_world_size()


def test_srun_meets_at_the_first_node_of_the_list(env: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$1 $2 $3" = "show hostnames n[7-8]" ] && printf "n7\\nn8\\n"\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
    _set(env, PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_NODELIST="n[7-8]", SLURM_JOB_ID="123")
    _set(env, SLURM_PROCID="5", SLURM_NTASKS="8", SLURM_LOCALID="1")
    place = layout_module._read_place(os.environ)
    assert (place.rank, place.world_size, place.local_rank) == (5, 8, 1)
    assert place.store is not None
    assert place.store[0] == "n7"
    env.setenv("SLURM_JOB_ID", "124")
    assert layout_module._read_place(os.environ).store != place.store
    _set(env, MASTER_ADDR="other", MASTER_PORT="4000")
    assert layout_module._read_place(os.environ).store == ("other", 4000)


def test_srun_without_scontrol_says_what_to_export(env: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _set(env, PATH=str(tmp_path), SLURM_JOB_NODELIST="n[7-8]", SLURM_PROCID="0", SLURM_NTASKS="2")
    with pytest.raises(ConfigError, match="export MASTER_ADDR"):
        layout_module._read_place(os.environ)


def test_a_world_that_cannot_be_divided_is_refused_before_anything_starts(env: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"1 processes.*tensor_size=2 x parallel\.pipeline_size=1 = 2"):
        start_parallel(ParallelSection(tensor_size=2), seed=1)


def _start(section: dict[str, Any]) -> tuple[Any, ...]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if section.pop("alone", False) else ():
        del os.environ[name]
    found = start_parallel(ParallelSection(**section), seed=3)
    again = (found.tp_rank, found.pp_rank, found.dp_rank, found.is_first_pp_stage, found.is_last_pp_stage)
    stop_parallel()
    return again


def test_ranks_of_a_2_x_2_x_2_world() -> None:
    """Neighbours share a tensor-parallel group; pipeline stages lie farthest apart."""
    ranks = run_ranks(_start, 8, {"tensor_size": 2, "pipeline_size": 2})
    assert ranks == [(r % 2, r // 4, r // 2 % 2, r < 4, r >= 4) for r in range(8)]


def test_one_process_starts_alone() -> None:
    assert run_ranks(_start, 1, {"alone": True}) == [(0, 0, 0, True, True)]


def _restart() -> list[int]:
    sizes = []
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE")
    for name in LAUNCHER:
        os.environ.pop(name)
    for _ in range(2):
        sizes.append(start_parallel(ParallelSection(), seed=3).world_size)
        stop_parallel()
    return sizes


def test_a_layout_can_be_started_again() -> None:
    assert run_ranks(_restart, 1) == [[1, 1]]


def _shim_twice() -> list[Any]:
    install_cpu_shim()
    install_cpu_shim()
    import megatron.core.pipeline_parallel.schedules as schedules

    inside = schedules.torch.zeros(1, device="cuda").device.type
    try:
        outside = torch.zeros(1, device="cuda").device.type
    except (RuntimeError, AssertionError):
        outside = "refused"
    return [inside, outside, torch.zeros(1).type(), schedules.torch.nn is torch.nn]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the shim is not installed where there is a GPU")
def test_the_shim_changes_megatron_alone() -> None:
    assert run_ranks(_shim_twice, 1) == [["cpu", "refused", "torch.FloatTensor", True]]
