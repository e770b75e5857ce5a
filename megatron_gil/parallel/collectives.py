"""Sums, maxima and objects exchanged between ranks, over the process groups of a layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gil.config import ConfigError
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.types import AllSum

Rows = TypeVar("Rows")
Result = TypeVar("Result")


def all_sum(layout: ParallelLayout) -> AllSum:
    """The sum over data-parallel ranks, any dtype, as a new tensor on the device of the one given."""

    def sum_over_dp(tensor: Tensor) -> Tensor:
        if layout.dp_size == 1:
            return tensor.clone()
        total = tensor.to(layout.device, copy=True)
        dist.all_reduce(total, group=layout.dp_pg)
        return total.to(tensor.device)

    return sum_over_dp


def max_over_ranks(value: int, layout: ParallelLayout) -> int:
    """The largest of all ranks of the world."""
    return _reduce_int(value, dist.ReduceOp.MAX, layout, layout.world_pg)


def min_over_ranks(value: int, layout: ParallelLayout) -> int:
    """The smallest of all ranks of the world."""
    return _reduce_int(value, dist.ReduceOp.MIN, layout, layout.world_pg)


def begin_max_over_ranks(value: int, layout: ParallelLayout) -> Callable[[], int]:
    """max_over_ranks in two parts: this call only starts it, and the function that it returns waits for the result."""
    if layout.world_size == 1:
        return lambda: value
    box = torch.tensor(value, dtype=torch.int64)  # in host memory: a GPU need not finish its work first
    work = dist.all_reduce(box, op=dist.ReduceOp.MAX, group=layout.world_pg, async_op=True)
    assert work is not None

    def finish() -> int:
        work.wait()
        return int(box.item())

    return finish


def any_rank(flag: bool, layout: ParallelLayout) -> bool:
    """Whether the flag is set on any rank of the world."""
    return bool(max_over_ranks(int(flag), layout))


def all_agree(flag: bool, layout: ParallelLayout) -> bool:
    """Whether the flag is set on every rank of the world."""
    return bool(min_over_ranks(int(flag), layout))


def sum_over_tp(tensor: Tensor, layout: ParallelLayout) -> None:
    """The sum over tensor-parallel ranks, written into the tensor given."""
    if layout.tp_size > 1:
        dist.all_reduce(tensor, group=layout.tp_pg)


def concat_over_pp(part: Tensor, layout: ParallelLayout) -> Tensor:
    """The pipeline ranks' rows, of equal shape, in the order of ranks."""
    if layout.pp_size == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(layout.pp_size)]
    dist.all_gather(parts, part.contiguous(), group=layout.pp_pg)
    return torch.cat(parts)


def concat_over_tp(part: Tensor, dim: int, layout: ParallelLayout) -> Tensor:
    """The tensor-parallel ranks' parts, in their order, along an axis."""
    if layout.tp_size == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(layout.tp_size)]
    dist.all_gather(parts, part, group=layout.tp_pg)
    return torch.cat(parts, dim=dim)


def gather_over_tp(part: Tensor, dim: int, tp_rank: int, layout: ParallelLayout) -> Tensor | None:
    """The tensor-parallel ranks' parts, in their order, along axis 0 or 1: on one of the ranks, None on the others."""
    if layout.tp_size == 1:
        return part
    whole = part.new_empty(layout.tp_size, *part.shape) if layout.tp_rank == tp_rank else None
    parts = None if whole is None else list(whole)  # views: axis 0 needs no second copy
    dist.gather(part.contiguous(), parts, group=layout.tp_pg, group_dst=tp_rank)
    return None if whole is None else whole.movedim(0, dim).flatten(dim, dim + 1)


def broadcast_object(obj: Any, layout: ParallelLayout) -> Any:
    """Rank 0's object, on every rank (by pickle)."""
    box = [obj]
    if layout.world_size > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(obj: Any, layout: ParallelLayout) -> list[Any]:
    """Every rank's object (by pickle), in the order of ranks, on every rank."""
    objects = [obj] * layout.world_size
    if layout.world_size > 1:
        dist.all_gather_object(objects, obj)
    return objects


def agree(layout: ParallelLayout, check: Callable[[], Result]) -> Result:
    """check() on every rank; if it raises ConfigError anywhere, every rank raises the first rank's."""
    result, message = None, None
    try:
        result = check()
    except ConfigError as error:
        message = str(error)
    for rank, found in enumerate(gather_objects(message, layout)):
        if found is not None:
            raise ConfigError(found if rank == 0 else f"rank {rank}: {found}")
    return result  # type: ignore[return-value]


def barrier(layout: ParallelLayout) -> None:
    """Returns when every rank has come here."""
    any_rank(False, layout)


def _reduce_int(value: int, op: Any, layout: ParallelLayout, group: dist.ProcessGroup) -> int:
    box = torch.tensor(value, dtype=torch.int64)  # in host memory: a GPU need not finish first
    dist.all_reduce(box, op=op, group=group)
    return int(box.item())
