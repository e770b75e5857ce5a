"""What a user can get wrong, checked before a model is built; the same answer on every rank."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any, TypeVar

from megatron_gil.config import CommandConfig, ConfigError, PpoConfig, TrainConfig, data_parallel_size
from megatron_gil.data.dataset import RowDataset
from megatron_gil.data.prompts import PromptDataset
from megatron_gil.models.llama import LlamaSpec
from megatron_gil.parallel.collectives import agree
from megatron_gil.parallel.layout import ParallelLayout, read_world_size
from megatron_gil.training.build import check_model, model_path
from megatron_gil.training.directory import take_directory
from megatron_gil.training.tokenizers import ROLES, RunTokenizers, read_tokenizers

T = TypeVar("T", bound=Sized)


def take_run_directory(config: TrainConfig, layout: ParallelLayout) -> None:
    """Rank 0 takes the run directory for all; every rank ends the same way if it cannot."""

    def take() -> list[str]:
        return take_directory(config) if layout.is_main else []

    for difference in agree(layout, take):
        print(f"resuming with another setting: {difference}", file=sys.stderr)


def check_models(command: str, config: CommandConfig) -> RunTokenizers:
    """Every model of the command, and the tokenizer that they share."""
    roles = ROLES[command]
    for role in roles:
        check_model(config, role, scored=role == "reward_model" and command in ("ppo", "score"))
    paths = {role: model_path(config, role) for role in roles}
    return read_tokenizers(command, config, paths, {role: LlamaSpec.read(path) for role, path in paths.items()})


def say_what_is_read(
    config: CommandConfig, layout: ParallelLayout, tokenizers: RunTokenizers, **datasets: RowDataset[Any] | None
) -> None:
    """On rank 0: how the rows of data.train, data.eval, ... fit, and what is odd about the tokenizers."""
    if not layout.is_main:
        return
    for note in tokenizers.notes:
        print(note, file=sys.stderr)
    for key, dataset in datasets.items():
        if dataset is not None:
            print(f"data.{key}={getattr(config.data, key)}: {dataset.measure()}", file=sys.stderr)


def check_rollout(config: PpoConfig, layout: ParallelLayout, train: PromptDataset) -> None:
    num_rows = config.ppo.prompts * config.ppo.responses_per_prompt
    if num_rows % config.batch.global_size:
        raise ConfigError(
            f"ppo.prompts={config.ppo.prompts} x ppo.responses_per_prompt={config.ppo.responses_per_prompt} cannot "
            f"be divided by batch.global_size={config.batch.global_size}; change one of them"
        )
    _check_comparisons(config, layout)
    if config.gil.groups == "known" and train.num_labelled < len(train):
        raise ConfigError(
            f"data.train={config.data.train}: gil.groups=known needs a group in every row, "
            f"{len(train) - train.num_labelled} of {len(train)} have none"
        )


def _check_comparisons(config: PpoConfig, layout: ParallelLayout) -> None:
    """What rloo and grpo need."""
    if config.ppo.advantages == "gae":
        return
    share, count = config.batch.global_size // layout.dp_size, config.ppo.responses_per_prompt
    if share % count:
        raise ConfigError(
            f"ppo.advantages={config.ppo.advantages} needs a prompt's responses on one rank: batch.global_size="
            f"{config.batch.global_size} / {layout.dp_size} data-parallel ranks = {share} rows cannot be divided by "
            f"ppo.responses_per_prompt={count}"
        )
    if config.gil.num_groups > 1 and config.gil.groups == "learned" and config.gil.classifier == "critic_head":
        raise ConfigError(
            f"ppo.advantages={config.ppo.advantages} has no critic to hold the group classifier; "
            "set gil.classifier=own_model"
        )


def limits(config: CommandConfig) -> dict[str, int]:
    return {"max_tokens": config.data.max_tokens, "max_prompt_tokens": config.data.max_prompt_tokens}


def read_train_and_eval(config: CommandConfig, kind: Callable[..., T], *args: Any, **kwargs: Any) -> tuple[T, T | None]:
    train = kind(require(config.data.train, "data.train", "it is what the command trains on"), *args, **kwargs)
    if not config.data.eval:
        return train, None
    held_out = kind(config.data.eval, *args, **kwargs)
    dp_size = data_parallel_size(read_world_size(), config.parallel)
    if len(held_out) < dp_size:
        raise ConfigError(
            f"data.eval={config.data.eval}: {len(held_out)} rows are too few for {dp_size} data-parallel ranks; add "
            "rows or set data.eval=null"
        )
    return train, held_out


def require(value: str | None, key: str, reason: str) -> str:
    if not value:
        raise ConfigError(f"{key} is not set: {reason}; give a file as {key}=PATH")
    return value


def new_file(value: str) -> Path:
    path = Path(value)
    if path.exists():
        raise ConfigError(f"output={path} exists already; nothing is overwritten, choose another name")
    if not path.parent.is_dir():
        raise ConfigError(f"output={path}: the directory {path.parent} does not exist")
    return path
