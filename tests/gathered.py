"""All ranks' rows and tensors in one place, to be compared with one rank's."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gil.models.hf import WeightMap
from megatron_gil.parallel.collectives import concat_over_tp
from megatron_gil.parallel.layout import ParallelLayout

Rows = TypeVar("Rows")


def gather_rows(rows: Rows, layout: ParallelLayout) -> Rows:
    """All data-parallel ranks' rows, in the order of ranks: of a tensor, or of every tensor of a batch of types.py.

    Every rank gives equal shapes. Fields that are None stay None.
    """
    if isinstance(rows, Tensor):
        return _gather_tensor(rows, layout)
    batch: Any = rows
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return replace(batch, **{n: v if v is None else _gather_tensor(v, layout) for n, v in values.items()})


def full_tensors(weights: WeightMap, param_name: str, local: Tensor) -> dict[str, Tensor]:
    """Hugging Face's tensors, bit for bit, of one parameter-shaped tensor; all tensor-parallel ranks call it together,
    and all get the result."""
    entry, full = weights.entry(param_name), {}
    parts = weights.split(param_name, local)
    for (name, part), shape in zip(parts.items(), weights.full_shape(entry), strict=True):
        dim = entry.weight.shard_dim
        whole = part if dim is None else concat_over_tp(part.contiguous(), dim, weights.layout)
        full[name] = whole.contiguous()[: shape[0]]  # without the rows that pad the vocabulary
    return full


def _gather_tensor(tensor: Tensor, layout: ParallelLayout) -> Any:
    if layout.dp_size == 1:
        return tensor
    local = tensor.to(layout.device).contiguous()
    parts = [torch.empty_like(local) for _ in range(layout.dp_size)]
    dist.all_gather(parts, local, group=layout.dp_pg)
    return torch.cat(parts).to(tensor.device)
