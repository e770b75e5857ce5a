"""A model with its optimizer as files: the model as a Hugging Face directory, Adam's state under the same names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.engine.files import FileWriter
from megatron_gil.engine.megatron import TrainableModel
from megatron_gil.engine.optimizer import MOMENTS, Fragment
from megatron_gil.engine.shards import Renames, ShardWriter
from megatron_gil.models.hf import WeightMap
from megatron_gil.models.hf_files import HfTensors
from megatron_gil.parallel.collectives import all_sum
from megatron_gil.parallel.layout import ParallelLayout


def tokenizer_files(directory: Path) -> dict[str, bytes]:
    """name -> content of what goes into every model's directory beside its weights."""
    files = Tokenizer.read(directory).files()
    generation = directory / "generation_config.json"
    return {**files, generation.name: generation.read_bytes()} if generation.is_file() else files


def save_model(
    model: TrainableModel,
    directory: Path,
    small_files: Mapping[str, bytes],
    files: FileWriter,
    *,
    extra_config: Mapping[str, Any] | None = None,
) -> Renames:
    """The model as a Hugging Face directory, which exists, with the small files on rank 0. Collective.

    extra_config: keys of config.json besides the model's sizes.
    """
    if model.layout.is_main:
        config = model.spec.hf_config(head=model.head, num_groups=model.num_groups, dtype=model.dtype)
        files.text(directory / "config.json", json.dumps(config | dict(extra_config or {}), indent=2))
        for name, content in small_files.items():
            files.content(directory / name, content)
    weights = WeightMap(model.spec, model.module, model.layout)
    writer = ShardWriter(directory, model.layout, files)
    params = dict(model.module.named_parameters())
    for order, entry in enumerate(weights.entries):
        if not entry.is_copy:
            _add_full(writer, weights, model.layout, order, entry.param_name, {"": params[entry.param_name].detach()})
    return writer.close()


def save_optimizer(model: TrainableModel, directory: Path, files: FileWriter) -> Renames:
    """Adam's state, and master weights where there are any, in a directory that exists. Collective."""
    assert model.optimizer is not None
    weights = WeightMap(model.spec, model.module, model.layout)
    copies = {entry.param_name for entry in weights.entries if entry.is_copy}
    writer = ShardWriter(directory, model.layout, files, stem="optimizer")
    for order, fragment in enumerate(model.optimizer.fragments()):
        parts = _fragment_tensors(fragment)
        whole = {f"{key}.": _whole(part, fragment, model) for key, part in parts.items()}
        if fragment.name not in copies:
            _add_full(writer, weights, model.layout, order, fragment.name, whole)
    return writer.close()


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
def load_optimizer(model: TrainableModel, directory: Path, num_steps: int) -> None:
    """Fill Adam's state from a directory written at any layout."""
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
