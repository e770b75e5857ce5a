"""Rank 0 takes what a command writes, for all ranks: one process at a time writes a run directory or an output."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from megatron_gil.config import CommandConfig, ConfigError, TrainConfig
from megatron_gil.parallel.collectives import agree
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.training.run.directory import RunDirectory, take_directory
from megatron_gil.training.run.lock import SILENCE_S, FileLock
from megatron_gil.training.run.output import new_file
from megatron_gil.training.run.progress import Progress


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


def take_output(
    output: Path,
    config: CommandConfig,
    layout: ParallelLayout,
    progress: Progress,
    *,
    check: Callable[[str], object] = new_file,
) -> None:
    """Rank 0 takes the output file for all: another process that writes the same one is refused.

    check: raises ConfigError where the output is there already.
    """

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
                check(str(output))  # another process may just have finished it

    agree(layout, take)


def _patience(config: CommandConfig) -> float:
    """How long rank 0 may look at a lock while the others wait for it."""
    return min(2 * SILENCE_S, config.parallel.timeout_s / 2)
