"""A disk that is full or gone while a checkpoint is written, and checkpoints written in the background."""

from __future__ import annotations

import resource
import shutil
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_gil.engine.checkpoint import CheckpointStore
from megatron_gil.engine.files import FileWriter
from tests.faults.processes import Ranks, SignalAt
from tests.faults.running import NUM_ITERATIONS, arguments, check_equal

SECOND, LAST = 2, 4
"""Iterations that are saved."""


def _arguments(world: Path, run: Path, *more: str) -> list[str]:
    return arguments("sft", world, run, "parallel.timeout_s=120", "checkpoint.background=false", *more)


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    ranks = Ranks(_arguments(world, directory / "sft"), world, directory / "log")
    assert ranks.wait() == [0, 0], ranks.said(0)
    return directory / "sft"


class SmallFiles:
    """Rank 1's system refuses files above 20 kB while iteration `iteration` is saved."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def __call__(self, rank: int) -> None:
        begin = CheckpointStore.begin

        def begin_on_a_full_disk(store: CheckpointStore, iteration: int, *rest: Any, **options: Any) -> None:
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            if iteration == self.iteration and rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
            begin(store, iteration, *rest, **options)
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        mock.patch.object(CheckpointStore, "begin", begin_on_a_full_disk).start()


class GoneDirectory:
    """Rank 0 deletes a directory before iteration LAST is saved."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __call__(self, rank: int) -> None:
        begin = CheckpointStore.begin

        def begin_elsewhere(store: CheckpointStore, iteration: int, *rest: Any, **options: Any) -> None:
            if iteration == LAST and rank == 0:
                shutil.rmtree(self.directory)
            begin(store, iteration, *rest, **options)

        mock.patch.object(CheckpointStore, "begin", begin_elsewhere).start()


def test_a_full_disk_stops_the_run_and_keeps_the_last_good_checkpoint(whole: Path, world: Path, tmp_path: Path) -> None:
    run = _arguments(world, tmp_path / "run")
    ranks = Ranks(run, world, tmp_path / "log", change=SmallFiles(LAST))
    assert ranks.wait() == [1, 1]
    said = " ".join(ranks.said(0).split())
    assert "iteration 4 cannot be saved: rank 1: " in said
    assert "File too large" in said or "os error 27" in said
    assert "older checkpoints are untouched" in said
    assert "Traceback" not in said + ranks.said(1)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [f"iter_{SECOND:07}"]
    again = Ranks(run, world, tmp_path / "again")
    assert again.wait() == [0, 0], again.said(0)
    check_equal(tmp_path / "run", whole)


def test_a_full_disk_may_be_ridden_out(whole: Path, world: Path, tmp_path: Path) -> None:
    run = _arguments(world, tmp_path / "run", "checkpoint.on_error=continue")
    ranks = Ranks(run, world, tmp_path / "log", change=SmallFiles(SECOND))
    assert ranks.wait() == [0, 0], ranks.said(0)
    assert "iteration 2 cannot be saved: rank 1: " in ranks.said(0).replace("\n", " ")
    check_equal(tmp_path / "run", whole)


def test_a_run_that_cannot_save_its_last_iteration_fails(world: Path, tmp_path: Path) -> None:
    run = _arguments(world, tmp_path / "run", "checkpoint.on_error=continue")
    ranks = Ranks(run, world, tmp_path / "log", change=SmallFiles(LAST))
    assert ranks.wait() == [1, 1]
    assert "the last iteration, 4, could not be saved" in ranks.said(0).replace("\n", " ")


def test_a_run_directory_that_is_gone_is_not_made_again(world: Path, tmp_path: Path) -> None:
    change = GoneDirectory(tmp_path / "run")
    ranks = Ranks(_arguments(world, tmp_path / "run"), world, tmp_path / "log", change=change)
    assert ranks.wait() == [1, 1]
    said = " ".join(ranks.said(0).split())
    assert "iteration 4 cannot be saved: " in said
    assert "run/checkpoints: No such file or directory" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


class SlowWriter:
    """Files are written in the background only once the next iteration has ended."""

    def __call__(self, rank: int) -> None:
        mock.patch.object(FileWriter, "done", property(lambda files: False)).start()


@pytest.mark.parametrize("change", [None, SlowWriter()])
def test_saving_in_the_background_changes_nothing(change: Any, whole: Path, world: Path, tmp_path: Path) -> None:
    """SlowWriter: the checkpoint of iteration 2 is completed only when the next one begins."""
    run = _arguments(world, tmp_path / "run", "checkpoint.background=true")
    ranks = Ranks(run, world, tmp_path / "log", change=change)
    assert ranks.wait() == [0, 0], ranks.said(0)
    check_equal(tmp_path / "run", whole)
    assert len(list((tmp_path / "run" / "checkpoints").glob("iter_*"))) == 2


@pytest.mark.parametrize(
    "name", ["engine.files.FileWriter._end", "training.supervised.trainer.SupervisedTrainer.evaluate"]
)
def test_kill_9_while_a_checkpoint_is_written_in_the_background(
    name: str, whole: Path, world: Path, tmp_path: Path
) -> None:
    run = _arguments(world, tmp_path / "run", "checkpoint.background=true", "checkpoint.every=1")
    killed = Ranks(run, world, tmp_path / "killed", change=SignalAt(name, 2, (1,)))
    assert killed.wait() == [1, -signal.SIGKILL], killed.said(0)
    again = Ranks(run, world, tmp_path / "again")
    assert again.wait() == [0, 0], again.said(0)
    check_equal(tmp_path / "run", whole)
    assert (tmp_path / "run" / "checkpoints" / f"iter_{NUM_ITERATIONS:07}").is_dir()
