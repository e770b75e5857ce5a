"""Checkpoints: every model as a Hugging Face directory, its optimizer beside it, the trainer's state, a manifest last.

    checkpoints/iter_0000100/
        policy/            config.json, model*.safetensors, tokenizer: what transformers loads, as it is
        policy.optimizer/  exp_avg.NAME, exp_avg_sq.NAME (and master.NAME in mixed precision), NAME as in policy/;
                           where several ranks hold one of them, its slices, such as exp_avg.NAME[0:8,0:4]
        critic/ ...        score.weight is the value head, group_head.weight the group classifier
        state.json         iteration, steps of each optimizer, what the loop and the trainer remember
        manifest.json      size and SHA-256 of every other file; written last: without it there is no checkpoint
    checkpoints/best       a link to the best one, with checkpoint.keep_best

Tensors are stored under Hugging Face's names and places, so that a checkpoint of any layout is read at any other: the
weights whole, each by one of the ranks that hold it, and the optimizer's state as slices, by the ranks that hold them
(model_files.py says what that costs). No random state is stored because there is none: every draw is a pure function of
(seed, position).
"""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gil.config import CheckpointSection
from megatron_gil.engine.files import FileWriter, digest, read_manifest, reason, write_manifest
from megatron_gil.engine.host_memory import available_host_bytes
from megatron_gil.engine.megatron import TrainableModel
from megatron_gil.engine.model_files import (
    load_optimizer,
    num_bytes_written,
    save_model,
    save_optimizer,
    tokenizer_files,
)
from megatron_gil.engine.shards import Renames
from megatron_gil.models.hf import load_weights
from megatron_gil.parallel.collectives import all_agree, broadcast_object, gather_objects
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.paths import sync

GIB = 1 << 30


class CheckpointError(RuntimeError):
    """No checkpoint can be read or written; one line says why. Raised by all ranks alike."""


@dataclass(frozen=True, slots=True)
class LoadedState:
    iteration: int
    state: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Unfinished:
    """A checkpoint whose files are being written, beside its place."""

    iteration: int
    beside: Path
    files: FileWriter
    renames: Renames
    best: int | None


class CheckpointStore:
    """The checkpoints/ directory of one run. All methods are collective."""

    def __init__(
        self, directory: Path, layout: ParallelLayout, section: CheckpointSection, *, tokenizer_dir: Path
    ) -> None:
        """tokenizer_dir: of the tokenizer that goes into every model's directory."""
        self._directory, self._layout, self._section = directory, layout, section
        self._small_files = tokenizer_files(tokenizer_dir) if layout.is_main else {}
        self._background = None if section.background == "auto" else section.background
        self._unfinished: _Unfinished | None = None

    @property
    def background(self) -> bool:
        """Whether checkpoints are written while training goes on; by checkpoint.background=auto known from the first
        `begin` on."""
        return bool(self._background)

    def save(self, iteration: int, models: Mapping[str, TrainableModel], state: dict[str, Any]) -> None:
        """Write beside, then rename: a checkpoint is there whole or not at all. Then delete what may go."""
        self.begin(iteration, models, state)
        self.finish(wait=True)

    def begin(
        self,
        iteration: int,
        models: Mapping[str, TrainableModel],
        state: dict[str, Any],
        *,
        best: int | None = None,
        extra_config: Mapping[str, Mapping[str, Any]] | None = None,
        note: Callable[[str], object] | None = None,
    ) -> None:
        """Write all files beside; with checkpoint.background only copy to host memory, and leave the rest to a thread.

        best: the iteration (this one or an earlier) that is never deleted, and that `best` links to. extra_config: what
        the config.json of a model says beside its sizes, by role. note: called on rank 0 with a line where
        checkpoint.background=auto finds too little memory.

        CheckpointError where the directory cannot be made; other errors come from `finish`.
        """
        assert self._unfinished is None, "the checkpoint before is not finished"
        beside = self._directory / f".iter_{iteration:07}.tmp"
        self._on_main(iteration, lambda: self._make_directories(beside, models))
        if self._background is None:
            self._background = self._has_room(models, note)
        files, renames = FileWriter(background=self._background), Renames()
        for role, model in models.items():
            renames |= save_model(
                model, beside / role, self._small_files, files, extra_config=(extra_config or {}).get(role)
            )
            renames |= save_optimizer(model, beside / f"{role}.optimizer", files)
            model.offload()  # the states of two models need not fit at once
        if self._layout.is_main:
            steps = {role: model.num_steps for role, model in models.items()}
            content = {"iteration": iteration, "steps": steps, "state": state}
            files.text(beside / "state.json", json.dumps(content, indent=1))
        files.start()
        self._unfinished = _Unfinished(iteration, beside, files, renames, best)

    def finish(self, *, wait: bool) -> None:
        """Put the checkpoint that was begun in its place, if there is one and all ranks have written their files.

        wait: wait until they have. Raises CheckpointError, with what rank and file, if any could not be written.
        """
        unfinished = self._unfinished
        if unfinished is None or not (wait or all_agree(unfinished.files.done, self._layout)):
            return
        unfinished.files.wait()
        self._unfinished = None
        for rank, error in enumerate(gather_objects(unfinished.files.error, self._layout)):
            if error:
                self._on_main(unfinished.iteration, lambda: shutil.rmtree(unfinished.beside, ignore_errors=True))
                raise CheckpointError(f"iteration {unfinished.iteration} cannot be saved: rank {rank}: {error}")
        written = gather_objects(unfinished.files.entries, self._layout)
        entries = {path: entry for part in written for path, entry in part.items()}
        self._on_main(unfinished.iteration, lambda: self._publish(unfinished, entries))

    def mark_best(self, iteration: int) -> None:
        """Let `best` link to a checkpoint that is there."""
        self._on_main(iteration, lambda: self._link_best(iteration))

    def find(self, note: Callable[[str], object] | None = None) -> Path | None:
        """The newest checkpoint whose files are all as the manifest says; None where there never was one.

        note: called on rank 0 with a line for each damaged one. Raises CheckpointError where all are damaged.
        """
        candidates = broadcast_object(self._candidates() if self._layout.is_main else None, self._layout)
        for path in candidates:
            damage = self._damage(path)
            if damage is None:
                return path
            if note is not None and self._layout.is_main:
                note(f"{path}: {damage}; trying the one before it")
        if candidates:
            raise CheckpointError(
                f"{self._directory}: every checkpoint is damaged, the newest: {self._damage(candidates[0])}"
            )
        return None

    def load(self, path: Path, models: Mapping[str, TrainableModel]) -> LoadedState:
        """Fill weights and optimizers from a checkpoint written at any layout."""
        content = json.loads((path / "state.json").read_text(encoding="utf-8"))
        for role, model in models.items():
            if not (path / role).is_dir():
                raise CheckpointError(f"{path}: holds no {role}; it is of another kind of run")
            load_weights(model.module, model.spec, path / role, self._layout)
            load_optimizer(model, path / f"{role}.optimizer", content["steps"][role])
            model.offload()
        return LoadedState(content["iteration"], content["state"])

    def _has_room(self, models: Mapping[str, TrainableModel], note: Callable[[str], object] | None) -> bool:
        """Whether on every host the copies of all its ranks leave as much memory free as they take."""
        host, size = socket.gethostname(), 0
        for model in models.values():
            size += num_bytes_written(model)
            model.offload()  # counting brought its states back
        copies: dict[str, int] = {}
        for name, other in gather_objects((host, size), self._layout):
            copies[name] = copies.get(name, 0) + other
        lacking = ""
        if (free := available_host_bytes()) < 2 * copies[host]:
            lacking = (
                f"{host} has {free / GIB:.1f} GiB of memory free, less than twice the {copies[host] / GIB:.1f} GiB"
            )
        lacking = next((text for text in gather_objects(lacking, self._layout) if text), "")
        if lacking and note is not None and self._layout.is_main:
            note(f"training waits while checkpoints are written: {lacking} that a copy takes (checkpoint.background)")
        return not lacking

    def _on_main(self, iteration: int, act: Callable[[], None]) -> None:
        """Rank 0 acts for all; if the system refuses, every rank raises CheckpointError."""
        error = ""
        if self._layout.is_main:
            try:
                act()
            except OSError as refused:
                error = f"{refused.filename}: {reason(refused)}" if refused.filename else reason(refused)
        if error := broadcast_object(error, self._layout):
            raise CheckpointError(f"iteration {iteration} cannot be saved: {error}")

    def _make_directories(self, beside: Path, models: Mapping[str, TrainableModel]) -> None:
        """Only the directories of checkpoints. The run directory must be there already: where its disk is no longer
        mounted, making it would put the checkpoint on another disk."""
        self._directory.mkdir(exist_ok=True)
        for left_over in self._directory.glob(".iter_*"):
            shutil.rmtree(left_over)
        beside.mkdir()
        for role in models:
            (beside / role).mkdir()
            (beside / f"{role}.optimizer").mkdir()

    def _publish(self, unfinished: _Unfinished, entries: dict[Path, dict[str, Any]]) -> None:
        beside, final = unfinished.beside, self._directory / f"iter_{unfinished.iteration:07}"
        for path, place in unfinished.renames.items():
            path.rename(place)
            entries[place] = entries.pop(path)
        write_manifest(beside, {str(path.relative_to(beside)): entry for path, entry in entries.items()})
        if final.exists():  # it is damaged: had it been good, the run would have resumed behind it
            self._put_away(final)
        beside.rename(final)
        if unfinished.best == unfinished.iteration:
            self._link_best(unfinished.iteration)
        sync(self._directory)
        self._prune(unfinished.iteration, unfinished.best)

    def _candidates(self) -> list[Path]:
        found = [p for p in self._directory.glob("iter_*") if re.fullmatch(r"iter_\d{7,}", p.name)]
        return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)

    def _damage(self, path: Path) -> str | None:
        """What is wrong with a checkpoint, the same on every rank, or None. Each rank reads some of the files."""
        expected = broadcast_object(read_manifest(path) if self._layout.is_main else None, self._layout)
        if expected is None:
            return "manifest.json is missing or unreadable"
        names = sorted(expected)
        mine = [_file_damage(path / n, n, *expected[n]) for n in names[self._layout.rank :: self._layout.world_size]]
        return next((damage for part in gather_objects(mine, self._layout) for damage in part if damage), None)

    def _link_best(self, iteration: int) -> None:
        beside = self._directory / ".best.tmp"
        beside.unlink(missing_ok=True)
        beside.symlink_to(f"iter_{iteration:07}")
        beside.replace(self._directory / "best")

    def _prune(self, newest: int, best: int | None) -> None:
        """Delete all but the last keep_last, every keep_every-th and the best, once that of `newest` is whole.

        Checkpoints later than `newest` are damaged, for the run resumed from one before them. They do not count among
        the last: each would take the place of a good one.
        """
        iterations = [iteration for path in self._candidates() if (iteration := int(path.name[5:])) <= newest]
        for iteration in iterations[self._section.keep_last :]:
            is_kept = self._section.keep_every and iteration % self._section.keep_every == 0
            if not is_kept and iteration != best:
                self._put_away(self._directory / f"iter_{iteration:07}")

    @staticmethod
    def _put_away(path: Path) -> None:
        """Delete a checkpoint; it loses its name first, so that a half-deleted one is never taken for a damaged one."""
        nameless = path.with_name(f".{path.name}.old")
        path.rename(nameless)
        shutil.rmtree(nameless, ignore_errors=True)


def _file_damage(file: Path, name: str, size: int, sha256: str) -> str | None:
    try:
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, expected {size}"
        return None if digest(file)["sha256"] == sha256 else f"{name} differs from its checksum"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {reason(error)}"
