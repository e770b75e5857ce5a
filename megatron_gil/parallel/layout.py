"""Where this process stands: its rank, its share of each model, its process groups. The only reader of megatron's
`parallel_state`."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel

from megatron_gil.config import ConfigError, ParallelSection, data_parallel_size
from megatron_gil.parallel.cpu import install_cpu_shim
from megatron_gil.parallel.device import check_own_gpu, prepare_device

NCCL_MARGIN_S = 120.0
"""How much longer than parallel.timeout_s NCCL waits for a collective."""


class StartError(RuntimeError):
    """The ranks of a run did not come together; one line says which are missing. Exit code 1."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ParallelLayout:
    """World = data parallel x pipeline parallel x tensor parallel; the same for every model of a run."""

    rank: int
    world_size: int
    local_rank: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    sequence_parallel: bool
    device: torch.device
    deterministic: bool
    seed: int
    tp_pg: dist.ProcessGroup
    pp_pg: dist.ProcessGroup
    dp_pg: dist.ProcessGroup
    world_pg: dist.ProcessGroup
    store: dist.Store  # keys and values that all ranks see; clone it to use it from a thread

    @property
    def is_first_pp_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_pp_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def speaks_for_copy(self) -> bool:
        """The first of the ranks that hold one copy of the models, all of which see the same rows."""
        return self.tp_rank == self.pp_rank == 0

    @property
    def is_main(self) -> bool:
        """The rank that writes logs."""
        return self.rank == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    rank: int
    world_size: int
    local_rank: int
    store: tuple[str, int] | None  # host and port; None: alone
    store_runs: bool = False  # torchrun keeps it; else rank 0 does
    attempt: int = 0  # times that torchrun has restarted the run


def read_world_size() -> int:
    """Processes of this run, from the environment alone (torchrun, srun, or 1)."""
    return _read_place(os.environ).world_size


Joined = Callable[[int, int, dist.Store], None]


def start_parallel(
    parallel: ParallelSection,
    *,
    seed: int,
    deterministic: bool = False,
    joined: Joined = lambda rank, world_size, store: None,
) -> ParallelLayout:
    """Join the other processes and form megatron's groups; `seed` also seeds megatron's RNG streams.

    deterministic: kernels that give the same bits each time, on CUDA; the CPU's already do. joined: called as soon as
    there is a store, with this rank, the number of ranks and the store.
    """
    place = _read_place(os.environ)
    data_parallel_size(place.world_size, parallel)
    device = prepare_device(place.local_rank, deterministic=deterministic)
    install_cpu_shim()
    store = _meet(place, parallel.timeout_s, joined)
    check_own_gpu(device, store, place.rank, place.world_size)
    # When a collective runs out of time, NCCL ends the process without an exception, so its limit is later than the
    # watchdog's, which says first which rank was late. gloo raises an exception, and the watchdog waits for it.
    timeout_s = parallel.timeout_s + (0.0 if device.type == "cpu" else NCCL_MARGIN_S)
    dist.init_process_group(
        # Logs and checkpoints also exchange CPU tensors, which nccl does not carry.
        backend="gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
        store=dist.PrefixStore("default_pg", store),
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=None if device.type == "cpu" else device,
    )
    mpu.initialize_model_parallel(
        parallel.tensor_size,
        parallel.pipeline_size,
        distributed_timeout_minutes=timeout_s / 60,  # type: ignore[arg-type]  only made a timedelta
        create_gloo_process_groups=False,  # they serve megatron's own checkpoints, which we do not write
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return _read_layout(place, store, parallel.sequence_parallel, device, deterministic, seed)


def stop_parallel() -> None:
    """Leave all groups, if there are any; a layout can be started again."""
    mpu.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _meet(place: _Place, timeout_s: float, joined: Joined) -> dist.Store:
    """The store of the run, once every rank has written into it. Polls, so that signals are not held up."""
    if place.store is None:
        return dist.HashStore()
    host, port = place.store
    try:
        store = dist.TCPStore(
            host,
            port,
            is_master=place.rank == 0 and not place.store_runs,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
        )
        # Each start has a prefix of its own: torchrun's store outlives a restart, and a process may start a layout
        # twice. Keys of an earlier start would be taken for those of this one.
        attempt = dist.PrefixStore(f"attempt_{place.attempt}", store)
        store = dist.PrefixStore(f"start_{attempt.add(f'starts_of_rank_{place.rank}', 1)}", attempt)
        joined(place.rank, place.world_size, store)
        store.set(f"rank_{place.rank}", "here")
        deadline, missing = time.monotonic() + timeout_s, list(range(place.world_size))
        while missing := [rank for rank in missing if not store.check([f"rank_{rank}"])]:
            if time.monotonic() > deadline:
                time.sleep(min(5.0, timeout_s) if place.rank == 0 else 0.0)  # rank 0 may host the store: others read it
                raise StartError(
                    f"rank {place.rank}: of {place.world_size} ranks, {missing} did not start within "
                    f"parallel.timeout_s={timeout_s:g}"
                )
            time.sleep(0.05)
    except dist.DistError as error:
        raise StartError(
            f"rank {place.rank}: no store at {host}:{port} within parallel.timeout_s={timeout_s:g}; is rank 0 "
            f"running there, and the port free? ({str(error).splitlines()[0]})"
        ) from None
    return store


def _read_layout(
    place: _Place,
    store: dist.Store,
    sequence_parallel: bool,
    device: torch.device,
    deterministic: bool,
    seed: int,
) -> ParallelLayout:
    return ParallelLayout(
        rank=place.rank,
        world_size=place.world_size,
        local_rank=place.local_rank,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        tp_size=mpu.get_tensor_model_parallel_world_size(),
        pp_rank=mpu.get_pipeline_model_parallel_rank(),
        pp_size=mpu.get_pipeline_model_parallel_world_size(),
        dp_rank=mpu.get_data_parallel_rank(),
        dp_size=mpu.get_data_parallel_world_size(),
        sequence_parallel=sequence_parallel,
        device=device,
        deterministic=deterministic,
        seed=seed,
        tp_pg=_group(mpu.get_tensor_model_parallel_group()),
        pp_pg=_group(mpu.get_pipeline_model_parallel_group()),
        dp_pg=_group(mpu.get_data_parallel_group()),
        world_pg=_group(dist.group.WORLD),
        store=store,
    )


def _group(found: object) -> dist.ProcessGroup:
    assert isinstance(found, dist.ProcessGroup), found
    return found


def _read_place(env: Mapping[str, str]) -> _Place:
    if "RANK" in env and "WORLD_SIZE" in env:
        return _Place(
            rank=_read_int(env, "RANK"),
            world_size=_read_int(env, "WORLD_SIZE"),
            local_rank=_read_int(env, "LOCAL_RANK", env["RANK"]),
            store=(_read_text(env, "MASTER_ADDR"), _read_int(env, "MASTER_PORT")),
            store_runs=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            attempt=_read_int(env, "TORCHELASTIC_RESTART_COUNT", "0"),
        )
    if "SLURM_PROCID" in env and _read_int(env, "SLURM_NTASKS", "1") > 1:
        return _Place(
            rank=_read_int(env, "SLURM_PROCID"),
            world_size=_read_int(env, "SLURM_NTASKS"),
            local_rank=_read_int(env, "SLURM_LOCALID", "0"),
            store=(_find_master_host(env), _find_master_port(env)),
        )
    return _Place(rank=0, world_size=1, local_rank=0, store=None)


def _read_text(env: Mapping[str, str], name: str) -> str:
    if not env.get(name):
        raise ConfigError(f"environment variable {name} is not set; start with torchrun or srun")
    return env[name]


def _read_int(env: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = env.get(name, default)
    if text is None or not text.isdecimal():
        raise ConfigError(f"environment variable {name}={text!r} must be a whole number; start with torchrun or srun")
    return int(text)


def _find_master_host(env: Mapping[str, str]) -> str:
    if "MASTER_ADDR" in env:
        return env["MASTER_ADDR"]
    nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST"))
    if nodes is None:
        raise ConfigError("neither MASTER_ADDR nor SLURM_JOB_NODELIST is set; export MASTER_ADDR in the batch script")
    try:
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], check=True, capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"scontrol show hostnames {nodes} failed: {error}; export MASTER_ADDR in the script"
        ) from None
    return hosts.stdout.split()[0]


def _find_master_port(env: Mapping[str, str]) -> int:
    """The same port on every rank, but another one for each job and job step on a node."""
    if "MASTER_PORT" in env:
        return _read_int(env, "MASTER_PORT")
    job = _read_int(env, "SLURM_JOB_ID", "0")
    return 20000 + (job * 31 + _read_int(env, "SLURM_STEP_ID", "0")) % 10000
