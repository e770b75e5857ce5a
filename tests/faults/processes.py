"""Ranks that may die: each a process of its own, with an exit code, killed from inside at a chosen call."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pkgutil
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_gil.cli import main
from tests.ranks import PATIENCE_S
from tests.training.running import use_cache

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.ranks_preload"])

Change = Callable[[int], object]
"""What a rank does to itself before the command begins, given its number."""


@dataclass(frozen=True)
class SignalAt:
    """Ranks `victims` send themselves a signal at the n-th call (from 1) of a function of the package."""

    name: str
    call: int
    victims: tuple[int, ...]
    number: signal.Signals = signal.SIGKILL

    def __call__(self, rank: int) -> None:
        if rank not in self.victims:
            return
        original, calls = pkgutil.resolve_name(f"megatron_gil.{self.name}"), itertools.count(1)

        def call_or_die(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == self.call:
                os.kill(os.getpid(), self.number)
            return original(*args, **kwargs)

        mock.patch(f"megatron_gil.{self.name}", call_or_die).start()


class Ranks:
    """A command in `world_size` processes; rank 0 keeps the store, as under srun."""

    def __init__(
        self,
        arguments: Sequence[str],
        root: Path,
        log: Path,
        *,
        world_size: int = 2,
        start: Sequence[int] | None = None,
        change: Change | None = None,
    ) -> None:
        """start: the ranks that are started; None: all."""
        port = _free_port()
        self.logs = [log.with_name(f"{log.name}.{rank}") for rank in range(world_size)]
        self.processes = []
        for rank, path in enumerate(self.logs):
            fixed = (list(arguments), root, path, rank, world_size, port, change)
            self.processes.append(_CONTEXT.Process(target=_run, args=fixed, daemon=True))
            if start is None or rank in start:
                self.processes[-1].start()

    def wait(self, timeout_s: float = PATIENCE_S) -> list[int | None]:
        """Exit codes; None for a rank that has not ended (and is killed now)."""
        for process in self._started():
            process.join(timeout_s)
        codes = [process.exitcode for process in self.processes]
        self.kill()
        return codes

    def kill(self, ranks: Sequence[int] | None = None) -> None:
        for process in self._started():
            if ranks is None or self.processes.index(process) in ranks:
                process.kill()
                process.join()

    def _started(self) -> list[Any]:
        return [process for process in self.processes if process.pid is not None]

    def said(self, rank: int) -> str:
        return self.logs[rank].read_text()


def _run(
    arguments: list[str], root: Path, log: Path, rank: int, world_size: int, port: int, change: Change | None
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    use_cache(root)
    if change is not None:
        change(rank)
    sys.exit(main(arguments))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
