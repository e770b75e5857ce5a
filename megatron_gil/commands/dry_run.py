"""`--dry-run`: config, data, layout and memory are resolved on a machine without a GPU, with neither megatron nor a
process group, and every rank's share is printed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_gil.commands.plan import memory_table, wide_console
from megatron_gil.config import (
    BatchPlan,
    CommandConfig,
    ConfigError,
    GenerateConfig,
    PpoConfig,
    ScoreConfig,
    TrainConfig,
    data_parallel_size,
)
from megatron_gil.config.files import dump_config
from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.models.llama import LlamaSpec, check_layout
from megatron_gil.planning.memory import GIB, Cut
from megatron_gil.planning.rank import RankMemory, rank_memory
from megatron_gil.planning.workload import Workload, read_workload
from megatron_gil.training.run.best import check_keep_best
from megatron_gil.training.run.output import new_file
from megatron_gil.training.tokenizers import FALLBACKS, ROLES, read_tokenizers


def dry_run(command: str, config: TrainConfig, arguments: argparse.Namespace, console: Console | None = None) -> int:
    """0: the run can start as it is. ConfigError (exit code 2): it cannot."""
    console = console or wide_console()
    check_keep_best(config)
    parallel = config.parallel
    num_gpus = arguments.gpus or parallel.tensor_size * parallel.pipeline_size
    plan = BatchPlan.of(num_gpus, parallel, config.batch)
    roles = ROLES[command]
    directories, notes = _find_models(config, roles, arguments.sizes_from)
    specs = {role: LlamaSpec.read(directory) for role, directory in directories.items()}
    for spec in specs.values():
        check_layout(spec, parallel.tensor_size, parallel.pipeline_size, parallel.sequence_parallel)
    there = {role: path for role, path in directories.items() if role == roles[0] or _is_there(config, role)}
    tokenizers = read_tokenizers(command, config, there, specs)
    data = [*tokenizers.notes, *_read_data(command, config, tokenizers.tokenizer, plan)]
    workload = read_workload(command, config, specs)
    cut = Cut(
        tp_size=parallel.tensor_size,
        pp_size=parallel.pipeline_size,
        dp_size=plan.dp_size,
        sequence_parallel=parallel.sequence_parallel,
        distributed_optimizer=parallel.distributed_optimizer,
    )
    ranks = [rank_memory(workload, cut, pp_rank) for pp_rank in range(cut.pp_size)]
    console.print(dump_config(config), markup=False)
    for line in (*notes, *data, _layout_line(cut, plan)):
        console.print(line, markup=False)
    for pp_rank, rank in enumerate(ranks):
        console.print(memory_table(rank, _rank_title(workload, cut, pp_rank)))
    _check_memory(ranks, arguments.gpu_memory)
    return 0


def dry_run_answers(config: GenerateConfig | ScoreConfig, arguments: argparse.Namespace) -> int:
    """The same for generate and score, without the memory. What an earlier stage has yet to write may be absent where
    --sizes-from stands for it."""
    role = "policy" if isinstance(config, GenerateConfig) else "reward_model"
    console, parallel, sizes_from = wide_console(), config.parallel, arguments.sizes_from
    dp_size = data_parallel_size(arguments.gpus or parallel.tensor_size * parallel.pipeline_size, parallel)
    directories, notes = _find_models(config, (role,), sizes_from)
    spec = LlamaSpec.read(directories[role])
    check_layout(spec, parallel.tensor_size, parallel.pipeline_size, parallel.sequence_parallel)
    new_file(config.output, may_lack_directory=sizes_from is not None)
    notes += _read_questions(config, role, directories[role], spec, sizes_from)
    console.print(dump_config(config), markup=False)
    notes.append(f"{dp_size} data-parallel rank(s); rows to {config.output}")
    for line in notes:
        console.print(line, markup=False)
    return 0


def _read_questions(
    config: GenerateConfig | ScoreConfig, role: str, directory: Path, spec: LlamaSpec, sizes_from: Path | None
) -> list[str]:
    """What is answered or scored, read as the command would; lines about it."""
    from megatron_gil.data.rows.demonstrations import ResponseDataset
    from megatron_gil.data.rows.prompts import PromptDataset

    command = "generate" if role == "policy" else "score"
    tokenizers = read_tokenizers(command, config, {role: directory}, {role: spec})
    data = config.data
    if not data.train:
        raise ConfigError("data.train is not set: it is what the command reads; give a file as data.train=PATH")
    if sizes_from is not None and not Path(data.train).exists():
        return [*tokenizers.notes, f"data.train={data.train} is not there yet"]
    limits = {"max_prompt_tokens": data.max_prompt_tokens}
    if role == "policy":
        rows: Any = PromptDataset(data.train, tokenizers.tokenizer, **limits)
    else:
        rows = ResponseDataset(data.train, tokenizers.tokenizer, max_tokens=data.max_tokens, **limits)
    return [*tokenizers.notes, f"data.train={data.train}: {rows.measure()}"]


def _find_models(
    config: CommandConfig, roles: tuple[str, ...], sizes_from: Path | None
) -> tuple[dict[str, Path], list[str]]:
    """The directory of each role's sizes, and a note for each model that does not exist yet."""
    directories, notes = {}, []
    for role in roles:
        value = getattr(config.models, role) or getattr(config.models, FALLBACKS.get(role, role))
        if not value:
            raise ConfigError(f"models.{role} is not set; give the directory of a Llama, as models.{role}=DIR")
        directories[role] = Path(value)
        if not Path(value).is_dir():
            if sizes_from is None:
                raise ConfigError(
                    f"models.{role}={value} is not a directory; where an earlier stage has yet to write it, give "
                    "--sizes-from LLAMA_DIR"
                )
            directories[role] = sizes_from
            notes.append(f"models.{role}={value} is not there yet: sizes of {sizes_from}")
        else:
            _check_weights(
                role, Path(value), scored=role == "reward_model" and isinstance(config, PpoConfig | ScoreConfig)
            )
    return directories, notes


def _is_there(config: TrainConfig, role: str) -> bool:
    return Path(getattr(config.models, role) or getattr(config.models, FALLBACKS.get(role, role))).is_dir()


def _check_weights(role: str, path: Path, *, scored: bool) -> None:
    """The headers of the weight files: every tensor is there, as config.json says, and no file is cut off."""
    from megatron_gil.models.convert.check import SCORE_HEAD, check_tensors
    from megatron_gil.models.convert.weight_files import read_safetensors

    spec, files = LlamaSpec.read(path), read_safetensors(path)
    has_scores = any(SCORE_HEAD in file.tensors for file in files)
    if scored and not has_scores:
        raise ConfigError(f"models.reward_model={path} has no score.weight; train it with `megatron-gil reward` first")
    head = "score" if has_scores and role not in ("policy", "ref_policy") else "lm"
    check_tensors(files, spec, head, path, others=True)


def _read_data(command: str, config: TrainConfig, tokenizer: Tokenizer, plan: BatchPlan) -> list[str]:
    """Every file is read and checked row by row, as the run would; a line for each."""
    from megatron_gil.data.rows.demonstrations import DemonstrationDataset, TextDataset
    from megatron_gil.data.rows.preferences import PreferenceDataset
    from megatron_gil.data.rows.prompts import PromptDataset
    from megatron_gil.training.ppo.checks import check_rollout

    limits = {"max_tokens": config.data.max_tokens, "max_prompt_tokens": config.data.max_prompt_tokens}
    kind: Any = {"sft": DemonstrationDataset, "ppo": PromptDataset}.get(command, PreferenceDataset)
    if command == "ppo":
        del limits["max_tokens"]
    if not config.data.train:
        raise ConfigError("data.train is not set: it is what the command trains on; give a file as data.train=PATH")
    train = kind(config.data.train, tokenizer, **limits)
    if isinstance(config, PpoConfig):
        check_rollout(config, plan.dp_size, train)
    lines = [f"data.train={config.data.train}: {train.measure()}", _length_line(config, len(train))]
    if config.data.eval:
        held_out = kind(config.data.eval, tokenizer, **limits)
        lines.append(f"data.eval={config.data.eval}: {held_out.measure()}")
        if len(held_out) < plan.dp_size:
            raise ConfigError(
                f"data.eval={config.data.eval}: {len(held_out)} rows are too few for {plan.dp_size} data-parallel "
                "ranks; add rows or set data.eval=null"
            )
    if isinstance(config, PpoConfig) and config.ppo.ptx_coef:
        if not config.data.pretrain:
            raise ConfigError("data.pretrain is not set: ppo.ptx_coef is above 0; give a file as data.pretrain=PATH")
        texts = TextDataset(
            config.data.pretrain,
            tokenizer,
            max_tokens=config.data.max_tokens,
            max_prompt_tokens=config.data.max_prompt_tokens,
        )
        lines.append(f"data.pretrain={config.data.pretrain}: {texts.measure()}")
    return lines


def _length_line(config: Any, num_rows: int) -> str:
    if isinstance(config, PpoConfig):
        passes = config.ppo.iterations * config.ppo.prompts / num_rows
        return f"{config.ppo.iterations:,} iterations of {config.ppo.prompts} prompts, {passes:.1f} times through them"
    updates = config.train.updates or max(1, config.train.epochs * num_rows // config.batch.global_size)
    return f"{updates:,} updates of {config.batch.global_size}"


def _layout_line(cut: Cut, plan: BatchPlan) -> str:
    return (
        f"{cut.num_gpus} processes: {cut.tp_size} tensor- x {cut.pp_size} pipeline- x {cut.dp_size} data-parallel; an "
        f"update is {plan.num_microbatches} microbatch(es) of {plan.micro_size} on each"
    )


def _rank_title(workload: Workload, cut: Cut, pp_rank: int) -> str:
    """megatron numbers ranks by tensor-, then data-, then pipeline-parallel place."""
    block = cut.tp_size * cut.dp_size
    first, last = pp_rank * block, (pp_rank + 1) * block - 1
    layers = workload.models[0].spec.layers_of(pp_rank, cut.pp_size)
    ends = [name for name, here in (("embedding", pp_rank == 0), ("head", pp_rank == cut.pp_size - 1)) if here]
    ranks = f"rank {first}" if first == last else f"each of ranks {first} to {last}"
    share = f", 1/{cut.tp_size} of each matrix" if cut.tp_size > 1 else ""
    held = ", ".join([f"layers {layers.start} to {layers.stop - 1}", *ends])
    return f"{ranks}: {held}{share}"


def _check_memory(ranks: list[RankMemory], gpu_memory: float | None) -> None:
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
    if gpu_memory is not None and peak > gpu_memory:
        raise ConfigError(
            f"estimated {peak:.1f} GiB on pipeline rank {worst} ({phase}) do not fit in --gpu-memory "
            f"{gpu_memory:g}; {fix}`megatron-gil plan` lists layouts that do"
        )
