"""Causal attention over packed rows, rotary position embedding included, on torch's fused kernel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_gil.models.kernels import expands_kv_heads


class RowLayout:
    """What every layer of a model needs of the places of a microbatch: derived by the first one that asks."""

    def __init__(self, frequencies: Tensor, window: int | None = None) -> None:
        """frequencies: [D / 2] radians per position, of models/rope.py. window: of the model's spec."""
        self._frequencies, self._window = frequencies, window
        self._places: Tensor | None = None
        self._found: tuple[Tensor | None, Tensor, Tensor, Tensor | None]

    def of(
        self, places: Tensor, num_tokens: int, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
        """(which of the places holds each packed token, None where every place holds one; cos, sin [W, 1, D / 2]; the
        mask of `attend`)."""
        if places is not self._places:
            order = None if places.numel() == num_tokens else packed_order(places, num_tokens)
            angles = torch.outer(torch.arange(places.shape[1], device=places.device), self._frequencies)
            cos, sin = (part[:, None].to(dtype) for part in (angles.cos(), angles.sin()))
            mask = window_mask(places.shape[1], self._window, places.device)
            self._places, self._found = places, (order, cos, sin, mask)
        return self._found


class RowAttention(torch.nn.Module):
    """softmax(q k^T / sqrt(D)) v, causal, within the model's window, for every row of its own.

    The layers around it see one sequence of real tokens, all rows one after the other. Here alone they are laid out as
    rows again, padded on the right to the longest: no real token sees what is right of it, so padding needs no mask.
    """

    def __init__(
        self, config: TransformerConfig, *, layout: RowLayout, softmax_scale: float | None = None, **_: Any
    ) -> None:
        """layout: of all layers of the model."""
        super().__init__()
        self.softmax_scale = softmax_scale
        self._layout = layout

    def forward(
        self,
        query: Tensor,  # [N, 1, heads, D]
        key: Tensor,  # [N, 1, kv heads, D]
        value: Tensor,  # [N, 1, kv heads, D]
        attention_mask: Tensor,  # the places [R, W] of engine/packing.py: megatron hands it on to here as it is
        **_: Any,
    ) -> Tensor:
        """[N, 1, heads * D]."""
        places = attention_mask
        order, cos, sin, mask = self._layout.of(places, len(query), query.dtype)
        query, key, value = (_Lay.apply(x.squeeze(1), places, order) for x in (query, key, value))
        query, key = (_Rotate.apply(x, cos, sin) for x in (query, key))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        output = attend(query, key, value, mask, scale=self.softmax_scale)
        return _Pack.apply(output.transpose(1, 2), places, order).flatten(1).unsqueeze(1)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float | None = None) -> Tensor:
    """Causal attention of rows [R, heads, W, D], over keys and values that may have fewer heads. mask: see window_mask.
    scale None: 1 / sqrt(D)."""
    heads, kv_heads = query.shape[1], key.shape[1]
    if key.device.type == "cuda" and expands_kv_heads(key.dtype, heads, kv_heads, masked=mask is not None):
        key, value = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=heads != key.shape[1]
    )


def window_mask(width: int, window: int | None, device: torch.device) -> Tensor | None:
    """[W, W], True where a position sees another: the last `window` up to itself. None where it sees all before it."""
    if window is None or width <= window:
        return None
    seen = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    return seen.triu(1 - window)


def packed_order(places: Tensor, num_tokens: int) -> Tensor:
    """[N]: which of the R x W places holds each packed token; places [R, W], -1 where a row has ended."""
    spare = places.new_empty(num_tokens + 1)
    spare[places.where(places >= 0, num_tokens).flatten()] = torch.arange(places.numel(), device=places.device)
    return spare[:num_tokens]


class _Lay(torch.autograd.Function):
    """Packed tokens [N, ...] as rows [R, W, ...]; what stands behind a row's end is of no meaning."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, places: Tensor, order: Tensor | None) -> Tensor:
        ctx.save_for_backward(order)
        return packed.unflatten(0, places.shape) if order is None else packed[places.clamp(min=0)]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Each place behind a row's end has gradient 0, for no output that is read depends on it: nothing is added."""
        (order,) = ctx.saved_tensors
        grad = grads[0].flatten(0, 1)
        return (grad if order is None else grad[order]), None, None


class _Pack(torch.autograd.Function):
    """Rows [R, W, ...] as packed tokens [N, ...]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, order: Tensor | None) -> Tensor:
        ctx.save_for_backward(places, order)
        flat = rows.flatten(0, 1)
        return flat if order is None else flat[order]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        places, order = ctx.saved_tensors
        if order is None:
            return grads[0].unflatten(0, places.shape), None, None
        rows = grads[0][places.clamp(min=0)]
        ended = (places < 0).view(*places.shape, *[1] * (rows.dim() - 2))
        return rows.masked_fill_(ended, 0), None, None


class _Rotate(torch.autograd.Function):
    """Llama's rotary embedding: (x, y) -> (x cos - y sin, y cos + x sin), x and y the halves of each head."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [R, W, heads, D], [W, 1, D / 2] twice
        ctx.save_for_backward(cos, sin)
        return _rotate(heads, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, -sin), None, None


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x, y = heads.chunk(2, dim=-1)
    rotated = torch.empty_like(heads, memory_format=torch.contiguous_format)
    out_x, out_y = rotated.chunk(2, dim=-1)
    torch.mul(x, cos, out=out_x).addcmul_(y, sin, value=-1)
    torch.mul(y, cos, out=out_y).addcmul_(x, sin)
    return rotated
