"""What is settled before CUDA starts. That runs really get it, tests/pretend and tests/gpu show."""

from __future__ import annotations

import pytest

from megatron_gil.config import ConfigError
from megatron_gil.parallel.device import _pick_gpu, _set_environment


def test_a_process_takes_the_gpu_of_its_place_on_the_machine() -> None:
    assert [_pick_gpu(local_rank, 4) for local_rank in range(4)] == [0, 1, 2, 3]  # torchrun: all see all
    assert [_pick_gpu(local_rank, 1) for local_rank in range(4)] == [0, 0, 0, 0]  # srun: each sees its own


def test_more_processes_than_gpus_are_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"process 2 of this machine .* finds only 2 GPUs; start at most 2 processes"):
        _pick_gpu(2, 2)


def test_the_environment_is_the_programs_own_unless_the_user_has_set_it() -> None:
    env: dict[str, str] = {}
    _set_environment(env, deterministic=False)
    assert env == {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    _set_environment(env, deterministic=True)
    assert env["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    env = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    _set_environment(env, deterministic=True)
    assert "PYTORCH_ALLOC_CONF" not in env
    assert env["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
