"""One rank fails, runs out of memory, hangs or never starts: both end, and each line says which rank, where and why."""

from __future__ import annotations

import functools
import importlib
import itertools
import pkgutil
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_gil.parallel.watchdog import Watchdog
from megatron_gil.training.run.out_of_memory import is_out_of_memory
from tests.faults.processes import Ranks
from tests.faults.running import arguments
from tests.ranks import PATIENCE_S


@dataclass(frozen=True)
class Misfortune:
    """What happens in rank 1 at the third call of a function of the package."""

    name: str
    what: Any

    def __call__(self, rank: int) -> None:
        original, calls = pkgutil.resolve_name(f"megatron_gil.{self.name}"), itertools.count(1)

        def happen(*args: Any, **kwargs: Any) -> Any:
            return self.what() if next(calls) == 3 else original(*args, **kwargs)

        if rank == 1:
            mock.patch(f"megatron_gil.{self.name}", happen).start()


def _need_a_petabyte() -> None:
    torch.empty(1 << 50)


def _raise() -> None:
    raise KeyError("no such thing")


def _hang() -> None:
    time.sleep(600)


CHOOSE, STEP = "engine.slots.Slots._choose", "engine.optimizer.ModelOptimizer.step"


def _run(world: Path, tmp_path: Path, misfortune: Misfortune, timeout_s: int = 600) -> tuple[list[Any], list[str]]:
    run = arguments("ppo", world, tmp_path / "run", f"parallel.timeout_s={timeout_s}")
    ranks = Ranks(run, world, tmp_path / "log", change=misfortune)
    ranks.processes[0].join(PATIENCE_S)
    if misfortune.what is _hang:
        ranks.kill([1])
    return ranks.wait(), [" ".join(ranks.said(rank).split()) for rank in range(2)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (CHOOSE, "out of memory in rollout, 4 rows of up to 7 tokens and 6 new ones; lower sampling.micro_size=2"),
        (STEP, "out of memory in critic update, 4 rows of up to"),
    ],
)
def test_out_of_memory_names_the_batch_and_the_key_to_lower(
    name: str, expected: str, world: Path, tmp_path: Path
) -> None:
    codes, said = _run(world, tmp_path, Misfortune(name, _need_a_petabyte))
    assert codes == [1, 1], said
    assert f"megatron-gil ppo: rank 1: {expected}" in said[1]
    assert "Traceback" not in "".join(said)
    if name == STEP:
        assert "lower batch.micro_size=2, set models.recompute=full or models.offload=all or raise" in said[1]
    else:
        assert "lower sampling.micro_size=2 or sampling.max_new_tokens, or set models.offload=rollout (" in said[1]
    assert f"rank 1 failed in {'rollout' if name == CHOOSE else 'critic update'}: rank 1: out of memory" in said[0]


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: out of memory",
        "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_out_of_memory_has_many_names(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_an_unforeseen_exception_has_one_traceback(world: Path, tmp_path: Path) -> None:
    codes, said = _run(world, tmp_path, Misfortune(STEP, _raise))
    assert codes == [1, 1], said
    assert said[1].count("Traceback") == 1
    assert "Traceback" not in said[0]
    assert "rank 1 failed in critic update: KeyError: 'no such thing'" in said[0]


def test_a_rank_that_hangs_is_named_when_a_collective_runs_out_of_time(world: Path, tmp_path: Path) -> None:
    codes, said = _run(world, tmp_path, Misfortune(STEP, _hang), timeout_s=10)
    assert codes[0] == 1, said
    assert "rank 1 did not come to a collective: it has been in critic update for" in said[0]
    assert "Traceback" not in said[0]


@dataclass(frozen=True)
class HangUnderNccl:
    """Rank 1 hangs, and a collective that runs out of time raises nothing in any rank, as NCCL's do not."""

    name: str

    def __call__(self, rank: int) -> None:
        layout, never = importlib.import_module("megatron_gil.parallel.layout"), timedelta(hours=1)
        for holder, name, late in (
            (layout.dist, "init_process_group", {"timeout": never}),
            (layout.mpu, "initialize_model_parallel", {"distributed_timeout_minutes": 60}),
        ):
            original = getattr(holder, name)
            patched = functools.partial(lambda call, late, *a, **k: call(*a, **{**k, **late}), original, late)
            mock.patch.object(holder, name, patched).start()
        mock.patch.object(Watchdog, "collectives_raise", property(lambda self: False, lambda self, value: None)).start()
        Misfortune(self.name, _hang)(rank)


def test_a_rank_that_hangs_is_named_where_collectives_do_not_raise(world: Path, tmp_path: Path) -> None:
    run = arguments("ppo", world, tmp_path / "run", "parallel.timeout_s=10")
    ranks = Ranks(run, world, tmp_path / "log", change=HangUnderNccl("training.ppo.iteration.PpoTrainer.iterate"))
    ranks.processes[0].join(PATIENCE_S)
    ranks.kill([1])
    assert ranks.wait()[0] == 1
    said = " ".join(ranks.said(0).split())
    assert "rank 1 keeps the others waiting: it has been in beginning iteration 3 for" in said
    assert "rank 0 waits in rollout for" in said
    assert "Traceback" not in said


def test_ranks_that_never_start_are_named(world: Path, tmp_path: Path) -> None:
    run = arguments("sft", world, tmp_path / "run", "parallel.timeout_s=3")
    ranks = Ranks(run, world, tmp_path / "log", start=[0, 2, 3], world_size=4)
    assert ranks.wait() == [1, None, 1, 1]
    for rank in (0, 2, 3):
        said = " ".join(ranks.said(rank).split())
        assert said.endswith(f"rank {rank}: of 4 ranks, [1] did not start within parallel.timeout_s=3")
