"""What a user can get wrong, checked before a model is built; the same answer on every rank."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any, TypeVar

from megatron_gil.config import (
    CommandConfig,
    ConfigError,
    GenerateConfig,
    ScoreConfig,
    TrainConfig,
    data_parallel_size,
)
from megatron_gil.models.llama import LlamaSpec
from megatron_gil.parallel.collectives import agree
from megatron_gil.parallel.layout import ParallelLayout, read_world_size
from megatron_gil.training.build import check_model, model_path
from megatron_gil.training.run.best import check_keep_best
from megatron_gil.training.run.directory import RunDirectory, take_directory
from megatron_gil.training.run.lock import SILENCE_S, FileLock
from megatron_gil.training.run.output import new_file
from megatron_gil.training.run.progress import Progress
from megatron_gil.training.tokenizers import ROLES, RunTokenizers, read_tokenizers

T = TypeVar("T", bound=Sized)


def take_run_directory(config: TrainConfig, layout: ParallelLayout, progress: Progress) -> RunDirectory | None:
    """Rank 0 takes the run directory for all, and has it then; every rank ends the same way if it cannot."""

    def take() -> RunDirectory | None:
        if not layout.is_main:
            return None
        return take_directory(
            config, stopping=progress.is_asked_to_stop, patience_s=_patience(config), at_end=progress.at_end
        )

    taken = agree(layout, take)
    for change in taken.changes if taken is not None else ():
        print(f"resuming with another setting: {change}", file=sys.stderr)
    return taken


def take_output(config: GenerateConfig | ScoreConfig, layout: ParallelLayout, progress: Progress) -> None:
    """Rank 0 takes the output file for all: another process that writes the same one is refused."""
    output = Path(config.output)

    def take() -> None:
        if layout.is_main:
            place = output.with_name(f".{output.name}.lock")
            try:
                lock = FileLock.take(
                    place, f"output={output}", stopping=progress.is_asked_to_stop, patience_s=_patience(config)
                )
            except OSError as error:
                raise ConfigError(f"output={output} cannot be written: {error.strerror}") from None
            if lock is not None:
                progress.at_end.callback(lock.release)
                new_file(config.output)  # another process may just have finished it

    agree(layout, take)


def _patience(config: CommandConfig) -> float:
    """How long rank 0 may look at a lock while the others wait for it."""
    return min(2 * SILENCE_S, config.parallel.timeout_s / 2)


def check_models(command: str, config: CommandConfig) -> RunTokenizers:
    """Every model of the command, and the tokenizer that they share."""
    roles = ROLES[command]
    for role in roles:
        check_model(config, role, scored=role == "reward_model" and command in ("ppo", "score"))
    paths = {role: model_path(config, role) for role in roles}
    return read_tokenizers(command, config, paths, {role: LlamaSpec.read(path) for role, path in paths.items()})


def limits(config: CommandConfig) -> dict[str, int]:
    return {"max_tokens": config.data.max_tokens, "max_prompt_tokens": config.data.max_prompt_tokens}


def read_train_and_eval(config: TrainConfig, kind: Callable[..., T], *args: Any, **kwargs: Any) -> tuple[T, T | None]:
    check_keep_best(config)
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
