"""The device of this process, and what must be settled before CUDA starts: allocator, determinism, attention."""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping

import torch
import torch.distributed as dist

from megatron_gil.config import ConfigError


def prepare_device(local_rank: int, *, deterministic: bool) -> torch.device:
    """This process's GPU, or the CPU where there is none. To be called before anything else asks for CUDA."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    _set_environment(os.environ, deterministic=deterministic)
    # cuDNN's attention is off: it spends some 30 ms on every new shape, and shapes differ from batch to batch.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.use_deterministic_algorithms(deterministic)
    # Deterministic mode would also fill every new tensor, to reveal reads of unwritten memory. That costs time: off.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    device = torch.device("cuda", _pick_gpu(local_rank, torch.cuda.device_count()))
    torch.cuda.set_device(device)
    return device


def _set_environment(env: MutableMapping[str, str], *, deterministic: bool) -> None:
    """Set variables that CUDA's libraries read when they start, except those that the user has set."""
    # With one connection kernels start in the order of the program. Without it megatron's layers warn at their first
    # call.
    env.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # Lengths differ from batch to batch, and blocks of a fixed size would fragment memory. A user may also have set the
    # variable's older name, which torch still reads.
    if "PYTORCH_CUDA_ALLOC_CONF" not in env:
        env.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if deterministic:
        env.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _pick_gpu(local_rank: int, num_gpus: int) -> int:
    """The index of this process's GPU. torchrun shows every process all GPUs of the machine; srun --gpus-per-task
    shows each process only its own, as GPU 0."""
    if num_gpus > 1 and local_rank >= num_gpus:
        raise ConfigError(
            f"process {local_rank} of this machine (counted from 0) finds only {num_gpus} GPUs; start at most "
            f"{num_gpus} processes on a machine, or show it more GPUs (CUDA_VISIBLE_DEVICES)"
        )
    return local_rank if num_gpus > 1 else 0


def check_own_gpu(device: torch.device, store: dist.Store, rank: int, world_size: int) -> None:
    """ConfigError, the same on every rank, where two ranks have one GPU. NCCL refuses that too, but its message does
    not name the cause."""
    if device.type != "cuda":
        return
    here = f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"
    store.set(f"gpu_of_rank_{rank}", here)
    owners: dict[str, int] = {}
    for other, found in enumerate(store.multi_get([f"gpu_of_rank_{r}" for r in range(world_size)])):
        gpu = found.decode()
        if gpu in owners:
            host = gpu.split()[0]
            raise ConfigError(
                f"ranks {owners[gpu]} and {other} have the same GPU of {host}, which shows "
                f"{torch.cuda.device_count()} to rank {rank}; start as many processes on a machine as it has GPUs"
            )
        owners[gpu] = other
