"""kill -9 and SIGSTOP of one rank or all, anywhere: the others end and say why, and a restart loses nothing."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from tests.faults.processes import Ranks, SignalAt
from tests.faults.running import arguments, check_equal
from tests.ranks import PATIENCE_S

TIMEOUT_S = 60.0
BOTH = (0, 1)
PLACES = {
    "rollout_rank_1": SignalAt("engine.slots.Slots._choose", 40, (1,)),
    "rollout_all": SignalAt("engine.slots.Slots._choose", 40, BOTH),
    "update_rank_0": SignalAt("engine.optimizer.ModelOptimizer.step", 7, (0,)),
    "update_all": SignalAt("engine.optimizer.ModelOptimizer.step", 8, BOTH),
    "first_save_all": SignalAt("engine.files._OpenFile.close", 3, BOTH),
    "second_save_rank_1": SignalAt("engine.files._OpenFile.close", 9, (1,)),
    "before_the_manifest": SignalAt("engine.checkpoint.write_manifest", 2, (0,)),
    "before_the_rename": SignalAt("engine.checkpoint.sync", 1, (0,)),
    "before_pruning": SignalAt("engine.checkpoint.CheckpointStore._prune", 2, (0,)),
    "metrics": SignalAt("training.run.row_file.RowFile.write", 5, (0,)),
}
QUICK = ("rollout_rank_1", "update_rank_0", "first_save_all", "before_the_rename")


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    ranks = Ranks(_arguments(world, directory / "ppo"), world, directory / "log")
    assert ranks.wait() == [0, 0], ranks.said(0)
    return directory / "ppo"


def _arguments(world: Path, run: Path) -> list[str]:
    return arguments("ppo", world, run, f"parallel.timeout_s={TIMEOUT_S}", "checkpoint.keep_last=1")


@pytest.mark.parametrize("place", [p if p in QUICK else pytest.param(p, marks=pytest.mark.long) for p in PLACES])
def test_a_restart_after_kill_9_ends_with_the_same_bits(place: str, whole: Path, world: Path, tmp_path: Path) -> None:
    run = _arguments(world, tmp_path / "run")
    killed = Ranks(run, world, tmp_path / "killed", change=PLACES[place])
    codes = killed.wait()
    survivors = [rank for rank in BOTH if codes[rank] == 1]  # of two victims the second may end by the first's death
    assert all(codes[rank] == -signal.SIGKILL for rank in BOTH if rank not in survivors), killed.said(0)
    assert len(survivors) < 2, killed.said(0)
    for rank in survivors:
        _check_line(killed.said(rank), rank, 1 - rank)
    again = Ranks(run, world, tmp_path / "again")
    assert again.wait() == [0, 0], again.said(0)
    check_equal(tmp_path / "run", whole)


@pytest.mark.parametrize("victim", BOTH)
def test_a_stopped_rank_is_named_within_the_time_out(victim: int, world: Path, tmp_path: Path) -> None:
    stop = SignalAt("engine.optimizer.ModelOptimizer.step", 3, (victim,), number=signal.SIGSTOP)
    ranks = Ranks(_arguments(world, tmp_path / "run"), world, tmp_path / "log", change=stop)
    other = 1 - victim
    ranks.processes[other].join(PATIENCE_S)
    assert ranks.processes[other].exitcode == 1, ranks.said(other)
    ranks.kill()
    waited = _check_line(ranks.said(other), other, victim)
    assert waited <= TIMEOUT_S


def _check_line(said: str, rank: int, victim: int) -> float:
    """The last line names the lost rank with its phase, and the phase of the one that waited; for how long it did."""
    line = said.strip().splitlines()[-1]
    found = re.fullmatch(rf"megatron-gil: rank {rank} ends, (\d+) s into [\w -]+: (.*)", line)
    assert found, said
    assert f"rank {victim} " in found[2]
    named = r"of it for \d+ s, the last from \w+|last heard of in \w+|has been in \w+"
    store = (
        r"the store of rank 0 (is gone|has not answered for \d+ s)"  # it died or stood still before its phase was read
    )
    assert re.search(named if victim else f"{named}|{store}", found[2])
    assert "Traceback" not in said
    return float(found[1])
