"""One rank fails, runs out of memory, hangs or never starts: both end, and each line says which rank, where and why."""

from __future__ import annotations

import itertools
import pkgutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.faults.processes import Ranks
from tests.faults.running import arguments


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


CHOOSE, STEP = "engine.generation.Generator._choose", "engine.optimizer.ModelOptimizer.step"


def _run(world: Path, tmp_path: Path, misfortune: Misfortune, timeout_s: int = 24) -> tuple[list[Any], list[str]]:
    run = arguments("ppo", world, tmp_path / "run", f"parallel.timeout_s={timeout_s}")
    ranks = Ranks(run, world, tmp_path / "log", change=misfortune)
    ranks.processes[0].join(90)
    if misfortune.what is _hang:
        ranks.kill([1])
    return ranks.wait(), [" ".join(ranks.said(rank).split()) for rank in range(2)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (CHOOSE, "out of memory in rollout, 2 rows of up to 7 tokens and 6 new ones; lower sampling.micro_size=2"),
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
        assert "lower batch.micro_size=2" in said[1]
    assert f"rank 1 failed in {'rollout' if name == CHOOSE else 'critic update'}: rank 1: out of memory" in said[0]


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


def test_ranks_that_never_start_are_named(world: Path, tmp_path: Path) -> None:
    run = arguments("sft", world, tmp_path / "run", "parallel.timeout_s=3")
    ranks = Ranks(run, world, tmp_path / "log", start=[0, 2, 3], world_size=4)
    assert ranks.wait() == [1, None, 1, 1]
    for rank in (0, 2, 3):
        said = " ".join(ranks.said(rank).split())
        assert said.endswith(f"rank {rank}: of 4 ranks, [1] did not start within parallel.timeout_s=3")
