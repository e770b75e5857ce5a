"""A model with its optimizer as files: the model as a Hugging Face directory, Adam's state under the same names.

What it costs a rank of a world of W that saves a model of N parameters with bfloat16 weights:

weights: Hugging Face wants whole tensors, so each goes to one of the ranks that hold a part of it, the one with the
    fewest bytes so far. It gets and writes about 2 N / W bytes, and no less than the largest tensor of those it is
    given. At most one whole tensor at a time is held, with a copy of it where tensor-parallel ranks share its columns.
Adam's state: nothing is sent. Each rank writes slices of what it holds, 12 N / W bytes; where data-parallel ranks hold
    copies, each writes its share of them.

A checkpoint that is written in the background holds all that its rank writes in host memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from heapq import heapreplace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.engine.files import FileWriter
from megatron_gil.engine.megatron import TrainableModel
from megatron_gil.engine.optimizer import MOMENTS, Fragment
from megatron_gil.engine.shards import Renames, ShardWriter, stored_dtype
from megatron_gil.models.convert.weight_files import StoredTensor
from megatron_gil.models.hf import Entry, Piece, WeightMap
from megatron_gil.models.slices import SlicedTensors, index_shape, slice_name
from megatron_gil.parallel.collectives import gather_over_tp


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
    layout, weights, writers = model.layout, _weight_map(model), _writers(model)
    writer = ShardWriter(directory, layout, files, _planned_weights(model))
    params = dict(model.module.named_parameters())
    for entry in _own_entries(weights):
        dim, parts = entry.weight.shard_dim, weights.split(entry.param_name, params[entry.param_name].detach())
        for (name, part), shape in zip(parts.items(), weights.full_shape(entry), strict=True):
            dp_rank, tp_rank = writers[name]
            if layout.dp_rank != dp_rank:
                continue
            whole = part if dim is None else gather_over_tp(part, dim, tp_rank, layout)
            if whole is not None and layout.tp_rank == tp_rank:
                writer.add(name, whole[: shape[0]])  # without the rows that pad the vocabulary
    return writer.close()


def save_optimizer(model: TrainableModel, directory: Path, files: FileWriter) -> Renames:
    """Adam's state, and master weights where there are any, in a directory that exists. Collective."""
    shares = list(_shares(model))
    planned = {name: tensor for share in shares for name, tensor in share.planned()}
    writer = ShardWriter(directory, model.layout, files, planned, stem="optimizer")
    for share in shares:
        for key, part in share.tensors().items():
            held = part.flatten().to("cpu")
            for piece in share.pieces:
                writer.add(_slice_name(key, piece), piece.of(held, share.start))
    return writer.close()


def num_bytes_written(model: TrainableModel) -> int:
    """By this rank, when it saves the model and its optimizer."""
    slices = (tensor for share in _shares(model) for _, tensor in share.planned())
    return sum(tensor.num_bytes for tensor in (*_planned_weights(model).values(), *slices))


@torch.no_grad()
def load_optimizer(model: TrainableModel, directory: Path, num_steps: int) -> None:
    """Fill Adam's state from a directory written at any layout. Each rank reads what it will hold, and no more."""
    assert model.optimizer is not None
    tensors, weights = SlicedTensors.open(directory, "optimizer"), _weight_map(model)
    for fragment in model.optimizer.fragments():
        pieces = list(weights.pieces(fragment.name, fragment.start, fragment.end))
        for key, part in _fragment_tensors(fragment).items():
            if part is not None:
                flat = torch.zeros(fragment.end - fragment.start, dtype=part.dtype)  # as are rows that pad
                for piece in pieces:
                    piece.put(tensors.read(f"{key}.{piece.hf_name}", piece.index), flat, fragment.start)
                part.copy_(flat.view_as(part))
    model.set_num_steps(num_steps)


def _weight_map(model: TrainableModel) -> WeightMap:
    return WeightMap(model.spec, model.module, model.layout)


def _own_entries(weights: WeightMap) -> list[Entry]:
    return [entry for entry in weights.entries if not entry.is_copy]


def choose_writers(sizes: Mapping[str, int], *, dp_size: int, tp_size: int) -> dict[str, tuple[int, int]]:
    """Tensor of one pipeline stage -> (data-, tensor-parallel rank) that writes it. The largest come first, each to the
    rank with the fewest bytes so far; equal ones go round the data-parallel ranks, which are on more hosts."""
    ranks, writers = [(0, number) for number in range(dp_size * tp_size)], {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        size, number = ranks[0]
        heapreplace(ranks, (size + sizes[name], number))
        writers[name] = number % dp_size, number // dp_size
    return writers


def _writers(model: TrainableModel) -> dict[str, tuple[int, int]]:
    weights, layout = _weight_map(model), model.layout
    sizes = {
        name: prod(shape)
        for entry in _own_entries(weights)
        for name, shape in zip(entry.hf_names, weights.full_shape(entry), strict=True)
    }
    return choose_writers(sizes, dp_size=layout.dp_size, tp_size=layout.tp_size)


def _planned_weights(model: TrainableModel) -> dict[str, StoredTensor]:
    """What this rank writes of the model, in the order in which it is gathered."""
    weights, writers, here = _weight_map(model), _writers(model), (model.layout.dp_rank, model.layout.tp_rank)
    return {
        name: StoredTensor(stored_dtype(model.dtype), shape)
        for entry in _own_entries(weights)
        for name, shape in zip(entry.hf_names, weights.full_shape(entry), strict=True)
        if writers[name] == here
    }


@dataclass(frozen=True, slots=True)
class _Share:
    """What this rank writes of one parameter's optimizer state: [start, end) of the flattened local parameter."""

    fragment: Fragment
    start: int
    end: int
    pieces: list[Piece]

    def tensors(self) -> dict[str, Tensor]:
        own = slice(self.start - self.fragment.start, self.end - self.fragment.start)
        return {key: part.view(-1)[own] for key, part in _fragment_tensors(self.fragment).items() if part is not None}

    def planned(self) -> Iterator[tuple[str, StoredTensor]]:
        """In the order in which they are written."""
        for key, part in self.tensors().items():
            for piece in self.pieces:
                stored = StoredTensor(stored_dtype(part.dtype), index_shape(piece.index))
                yield _slice_name(key, piece), stored


def _shares(model: TrainableModel) -> Iterator[_Share]:
    """Data-parallel ranks that hold the same share it. What all tensor-parallel ranks hold is small: the first's."""
    assert model.optimizer is not None
    weights, layout = _weight_map(model), model.layout
    for fragment in model.optimizer.fragments():
        entry, size = weights.entry(fragment.name), fragment.end - fragment.start
        if entry.is_copy or (entry.weight.shard_dim is None and layout.tp_rank > 0):
            continue
        number, count = (0, 1) if fragment.sharded else (layout.dp_rank, layout.dp_size)
        start, end = (fragment.start + size * i // count for i in (number, number + 1))
        if start < end:
            yield _Share(fragment, start, end, list(weights.pieces(fragment.name, start, end)))


def _slice_name(key: str, piece: Piece) -> str:
    return slice_name(f"{key}.{piece.hf_name}", piece.index, piece.whole)


def _fragment_tensors(fragment: Fragment) -> dict[str, Tensor | None]:
    """Adam's moments, and the master weights where there are any, as flat parts; None on a rank that holds none."""
    state = fragment.state
    parts: dict[str, Tensor | None] = {key: None if state is None else state[key] for key in MOMENTS}
    if fragment.mixed:
        parts["master"] = fragment.main
    return parts
