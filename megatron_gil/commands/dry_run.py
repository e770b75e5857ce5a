"""`--dry-run`: checks config, data, layout and memory, and prints what each rank will hold. It needs no
GPU, no megatron-core and no process group."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_gil.commands.plan import memory_table, wide_console
from megatron_gil.config import (
    AuditConfig,
    BatchPlan,
    CommandConfig,
    ConfigError,
    EvaluateRewardConfig,
    GenerateConfig,
    PpoConfig,
    ScoreConfig,
    TrainConfig,
    data_parallel_size,
)
from megatron_gil.config.files import dump_config
from megatron_gil.planning.memory import GIB, Cut
from megatron_gil.planning.rank import RankMemory, rank_memory
from megatron_gil.planning.search import OFFLOADS
from megatron_gil.planning.workload import Workload, read_workload
from megatron_gil.training.audit.length import audit_length
from megatron_gil.training.check_run import CheckedRun, check_run, count_updates, describe_rewards, path_of
from megatron_gil.training.hub_names import pin_names_alone
from megatron_gil.training.run.output import audit_files, quality_files


def dry_run(config: CommandConfig, arguments: argparse.Namespace) -> int:
    """0: the command can start as it is. ConfigError (exit code 2): it cannot."""
    console, config = wide_console(), pin_names_alone(config)
    parallel = config.parallel
    world_size = arguments.gpus or parallel.tensor_size * parallel.pipeline_size
    checked = check_run(config, world_size, sizes_from=arguments.sizes_from)
    cut = Cut(
        tp_size=parallel.tensor_size,
        pp_size=parallel.pipeline_size,
        dp_size=data_parallel_size(world_size, parallel),
        sequence_parallel=parallel.sequence_parallel,
        distributed_optimizer=parallel.distributed_optimizer,
    )
    console.print(dump_config(config), markup=False)
    data = [f"{key}={path_of(config, key)}: {r.describe()}" for key, r in checked.data.items()]
    scores = [] if checked.function is None else [f"scores: {describe_rewards(config)}"]
    for line in (*checked.notes, *data, *scores, *_what_comes(config, checked, cut)):
        console.print(line, markup=False)
    if isinstance(config, TrainConfig):
        workload = read_workload(config, checked.specs.__getitem__)
        ranks = [rank_memory(workload, cut, pp_rank) for pp_rank in range(cut.pp_size)]
        for pp_rank, rank in enumerate(ranks):
            console.print(memory_table(rank, _rank_title(workload, cut, pp_rank)))
        _check_memory(ranks, arguments.gpu_memory, _fitting_offload(workload, cut, arguments.gpu_memory))
    return 0


def _what_comes(config: CommandConfig, checked: CheckedRun, cut: Cut) -> list[str]:
    if isinstance(config, GenerateConfig | ScoreConfig):
        return [f"{cut.dp_size} data-parallel rank(s); rows to {config.output}"]
    if isinstance(config, EvaluateRewardConfig):
        files = quality_files(config.output, may_lack_directory=True)
        return [f"{cut.dp_size} data-parallel rank(s); scored pairs to {files.scored}, numbers to {files.numbers}"]
    assert isinstance(config, TrainConfig)
    if isinstance(config, AuditConfig):
        files = audit_files(config.output, may_lack_directory=True)
        return [audit_length(config), f"numbers to {files.numbers}, page to {files.page}"]
    return [
        _length_line(config, len(checked.train)),
        _layout_line(cut, BatchPlan.of(cut.num_gpus, config.parallel, config.batch)),
    ]


def _length_line(config: Any, num_rows: int) -> str:
    if isinstance(config, PpoConfig):
        passes = config.ppo.iterations * config.ppo.prompts / num_rows
        return f"{config.ppo.iterations:,} iterations of {config.ppo.prompts} prompts, {passes:.1f} times through them"
    return f"{count_updates(config, num_rows):,} updates of {config.batch.global_size}"


def _layout_line(cut: Cut, plan: BatchPlan) -> str:
    return (
        f"{cut.num_gpus} processes: {cut.tp_size} tensor- x {cut.pp_size} pipeline- x {cut.dp_size} data-parallel; an "
        f"update is {plan.microbatches} on each"
    )


def _rank_title(workload: Workload, cut: Cut, pp_rank: int) -> str:
    """Which ranks, and which part of the model they hold. megatron numbers ranks along the tensor-parallel axis
    first, then the data-, then the pipeline-parallel one."""
    block = cut.tp_size * cut.dp_size
    first, last = pp_rank * block, (pp_rank + 1) * block - 1
    layers = workload.models[0].spec.layers_of(pp_rank, cut.pp_size)
    ends = [name for name, here in (("embedding", pp_rank == 0), ("head", pp_rank == cut.pp_size - 1)) if here]
    ranks = f"rank {first}" if first == last else f"each of ranks {first} to {last}"
    share = f", 1/{cut.tp_size} of each matrix" if cut.tp_size > 1 else ""
    held = ", ".join([f"layers {layers.start} to {layers.stop - 1}", *ends])
    return f"{ranks}: {held}{share}"


def _fitting_offload(workload: Workload, cut: Cut, gpu_memory: float | None) -> str | None:
    """The least of models.offload with which the run fits."""
    for offload in OFFLOADS[OFFLOADS.index(workload.offload) :]:
        tried = workload.with_offload(offload)
        peak = max(rank_memory(tried, cut, pp_rank).peak for pp_rank in range(cut.pp_size))
        if gpu_memory is None or peak <= gpu_memory * GIB:
            return offload
    return None


def _check_memory(ranks: list[RankMemory], gpu_memory: float | None, offload: str | None) -> None:
    worst = max(range(len(ranks)), key=lambda i: ranks[i].peak)
    peak = ranks[worst].peak / GIB
    phase = ranks[worst].worst_phase
    fix = ""
    if phase == "rollout":
        received = ranks[worst].phases[phase]["weights"] / GIB
        fix = "lower sampling.micro_size"
        if received:
            fix += (
                f" or parallel.pipeline_size (to sample, the rank receives {received:.1f} GiB of the others' weights)"
            )
        fix += "; "
    if offload is not None:
        fix = f"models.offload={offload} fits; {fix}"
    if gpu_memory is not None and peak > gpu_memory:
        raise ConfigError(
            f"estimated {peak:.1f} GiB on pipeline rank {worst} ({phase}) do not fit in --gpu-memory "
            f"{gpu_memory:g}; {fix}`megatron-gil plan` lists layouts that do"
        )
