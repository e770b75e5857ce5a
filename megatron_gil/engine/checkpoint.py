"""Checkpoints: every model as a Hugging Face directory, its optimizer beside it, the trainer's state, a manifest last.

    checkpoints/iter_0000100/
        policy/            config.json, model*.safetensors, tokenizer: what transformers loads, as it is
        policy.optimizer/  exp_avg.NAME, exp_avg_sq.NAME (and master.NAME in mixed precision), NAME as in policy/
        critic/ ...        score.weight is the value head, group_head.weight the group classifier
        state.json         iteration, steps of each optimizer, the trainer's own state
        manifest.json      size and SHA-256 of every other file; written last: without it there is no checkpoint

Tensors are stored whole under Hugging Face's names, so that a checkpoint does not know the layout that wrote it. No
random state is stored because there is none: every draw is a pure function of (seed, position).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_gil.config import CheckpointSection
from megatron_gil.engine.megatron import TrainableModel
from megatron_gil.engine.optimizer import MOMENTS, Fragment
from megatron_gil.engine.shards import ShardWriter, write_text
from megatron_gil.models.hf import WeightMap, load_weights
from megatron_gil.models.hf_files import HfTensors
from megatron_gil.parallel.collectives import all_sum, barrier, broadcast_object, gather_objects
from megatron_gil.parallel.layout import ParallelLayout

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


class CheckpointError(RuntimeError):
    """No checkpoint can be read or written; one line says why."""


@dataclass(frozen=True, slots=True)
class LoadedState:
    iteration: int
    trainer: dict[str, Any]


class CheckpointStore:
    """The checkpoints/ directory of one run. All methods are collective."""

    def __init__(
        self, directory: Path, layout: ParallelLayout, section: CheckpointSection, *, tokenizer_dir: Path
    ) -> None:
        self._directory, self._layout, self._section, self._tokenizer_dir = directory, layout, section, tokenizer_dir

    def save(self, iteration: int, models: Mapping[str, TrainableModel], state: dict[str, Any]) -> Path:
        """Write beside, then rename: a checkpoint is there whole or not at all. Then delete what may go."""
        final = self._directory / f"iter_{iteration:07}"
        beside = self._directory / f".{final.name}.tmp"
        if self._layout.is_main:
            shutil.rmtree(beside, ignore_errors=True)
            for role in models:
                (beside / role).mkdir(parents=True)
                (beside / f"{role}.optimizer").mkdir()
        barrier(self._layout)
        for role, model in models.items():
            save_model(model, beside / role, self._tokenizer_dir)
            _save_optimizer(model, beside / f"{role}.optimizer")
        steps = {role: model.num_steps for role, model in models.items()}
        if self._layout.is_main:
            content = {"iteration": iteration, "steps": steps, "trainer": state}
            write_text(beside / "state.json", json.dumps(content, indent=1))
        barrier(self._layout)
        manifest = self._digest(beside, sorted(str(p.relative_to(beside)) for p in beside.rglob("*") if p.is_file()))
        if self._layout.is_main:
            write_text(beside / "manifest.json", json.dumps(manifest, indent=1))
            if final.exists():  # saved twice at one iteration: a stop right after a resume
                shutil.rmtree(final)
            beside.rename(final)
            self._prune(iteration)
        barrier(self._layout)
        return final

    def find(self, note: Any = None) -> Path | None:
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
            _load_optimizer(model, path / f"{role}.optimizer", content["steps"][role])
        return LoadedState(content["iteration"], content["trainer"])

    def _candidates(self) -> list[Path]:
        found = [p for p in self._directory.glob("iter_*") if re.fullmatch(r"iter_\d{7,}", p.name)]
        return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)

    def _damage(self, path: Path) -> str | None:
        """What is wrong with a checkpoint, found by all ranks together; None if nothing is."""
        try:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
            expected = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return "manifest.json is missing or unreadable"
        for name, (size, _) in expected.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes, expected {size}"
        found = self._digest(path, sorted(expected))
        for name, (_, digest) in expected.items():
            if found[name]["sha256"] != digest:
                return f"{name} differs from its checksum"
        return None

    def _digest(self, directory: Path, names: list[str]) -> dict[str, dict[str, Any]]:
        """Size and SHA-256 of each file; the ranks share the reading."""
        mine = {}
        for name in names[self._layout.rank :: self._layout.world_size]:
            with (directory / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            mine[name] = {"size": (directory / name).stat().st_size, "sha256": digest}
        merged = {name: entry for part in gather_objects(mine, self._layout) for name, entry in part.items()}
        return dict(sorted(merged.items()))

    def _prune(self, newest: int) -> None:
        """Delete all but the last keep_last and every keep_every-th, once that of iteration `newest` is whole.

        Later ones, which can only be damaged (the run went back behind them), are not counted: they would push out
        good ones.
        """
        iterations = [iteration for path in self._candidates() if (iteration := int(path.name[5:])) <= newest]
        for iteration in iterations[self._section.keep_last :]:
            if not self._section.keep_every or iteration % self._section.keep_every:
                shutil.rmtree(self._directory / f"iter_{iteration:07}")


def save_model(model: TrainableModel, directory: Path, tokenizer_dir: Path | None) -> None:
    """The model as a Hugging Face directory, which exists. Collective."""
    if model.layout.is_main:
        config = model.spec.hf_config(head=model.head, num_groups=model.num_groups, dtype=model.dtype)
        write_text(directory / "config.json", json.dumps(config, indent=2))
        for name in TOKENIZER_FILES:
            if tokenizer_dir is not None and (tokenizer_dir / name).exists():
                shutil.copyfile(tokenizer_dir / name, directory / name)
    weights = WeightMap(model.spec, model.module, model.layout)
    writer = ShardWriter(directory, model.layout)
    params = dict(model.module.named_parameters())
    for order, entry in enumerate(weights.entries):
        if not entry.is_copy:
            _add_full(writer, weights, model.layout, order, entry.param_name, {"": params[entry.param_name].detach()})
    writer.close()


def _save_optimizer(model: TrainableModel, directory: Path) -> None:
    assert model.optimizer is not None
    weights = WeightMap(model.spec, model.module, model.layout)
    copies = {entry.param_name for entry in weights.entries if entry.is_copy}
    writer = ShardWriter(directory, model.layout, stem="optimizer")
    for order, fragment in enumerate(model.optimizer.fragments()):
        parts = _fragment_tensors(fragment)
        whole = {f"{key}.": _whole(part, fragment, model) for key, part in parts.items()}
        if fragment.name not in copies:
            _add_full(writer, weights, model.layout, order, fragment.name, whole)
    writer.close()


def _add_full(
    writer: ShardWriter, weights: WeightMap, layout: ParallelLayout, order: int, name: str, tensors: dict[str, Tensor]
) -> None:
    """Let one rank of those that hold the parameter write it; they take turns, so that all of them write."""
    owner = order % (layout.dp_size * layout.tp_size)
    if layout.dp_rank != owner // layout.tp_size:
        return
    for prefix, tensor in tensors.items():
        full = weights.to_full(name, tensor)
        if layout.tp_rank == owner % layout.tp_size:
            for hf_name, value in full.items():
                writer.add(prefix + hf_name, value)


def _fragment_tensors(fragment: Fragment) -> dict[str, Tensor | None]:
    """Adam's moments, and the master weights where there are any, as flat parts; None on a rank that holds none."""
    state = fragment.state
    parts: dict[str, Tensor | None] = {key: None if state is None else state[key] for key in MOMENTS}
    if fragment.mixed:
        parts["master"] = fragment.main
    return parts


def _whole(part: Tensor | None, fragment: Fragment, model: TrainableModel) -> Tensor:
    """This tensor-parallel rank's whole tensor; where data-parallel ranks hold parts of it, from all of them."""
    shape = fragment.param.shape
    if fragment.end - fragment.start == shape.numel() and part is not None and not fragment.sharded:
        return part.view(shape)
    flat = torch.zeros(shape.numel(), dtype=torch.float32, device=fragment.param.device)
    if part is not None:
        flat[fragment.start : fragment.end] = part.flatten()
    return all_sum(model.layout)(flat).view(shape)


@torch.no_grad()
def _load_optimizer(model: TrainableModel, directory: Path, num_steps: int) -> None:
    assert model.optimizer is not None
    tensors = HfTensors.open(directory, "optimizer.safetensors", "optimizer.safetensors.index.json")
    weights = WeightMap(model.spec, model.module, model.layout)
    for fragment in model.optimizer.fragments():
        for key, part in _fragment_tensors(fragment).items():
            if part is not None:
                local = weights.to_local(
                    fragment.name, lambda name, index, key=key: tensors.read(f"{key}.{name}", index)
                )
                part.copy_(local.flatten()[fragment.start : fragment.end].view_as(part))
    model.set_num_steps(num_steps)
