"""What pipeline stages hand one another outside megatron's training schedules."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gil.parallel.layout import ParallelLayout


def receive_from_previous_pp_stage(shape: tuple[int, ...], dtype: torch.dtype, layout: ParallelLayout) -> Tensor | None:
    """The hidden states that the stage before sent; None on the first stage."""
    if layout.is_first_pp_stage:
        return None
    hidden = torch.empty(shape, dtype=dtype, device=layout.device)
    dist.recv(hidden, group=layout.pp_pg, group_src=layout.pp_rank - 1)
    return hidden


def send_to_next_pp_stage(hidden: Tensor, layout: ParallelLayout) -> None:
    dist.send(hidden.contiguous(), group=layout.pp_pg, group_dst=layout.pp_rank + 1)


def share_from_pp_stage(
    tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, pp_rank: int, layout: ParallelLayout
) -> Tensor:
    """One stage's tensor, on every stage; the others give None."""
    if tensor is None:
        tensor = torch.empty(shape, dtype=dtype, device=layout.device)
    assert tuple(tensor.shape) == shape, (tensor.shape, shape)
    assert tensor.dtype == dtype, (tensor.dtype, dtype)
    if layout.pp_size > 1:
        tensor = tensor.contiguous()
        dist.broadcast(tensor, group=layout.pp_pg, group_src=pp_rank)
    return tensor


def share_from_last_pp_stage(
    tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, layout: ParallelLayout
) -> Tensor:
    return share_from_pp_stage(tensor, shape, dtype, layout.pp_size - 1, layout)


def share_object_from_last_pp_stage(obj: Any, layout: ParallelLayout) -> Any:
    """The last stage's object on every stage (by pickle)."""
    if layout.pp_size == 1:
        return obj
    box = [obj]
    dist.broadcast_object_list(box, group=layout.pp_pg, group_src=layout.pp_size - 1)
    return box[0]
