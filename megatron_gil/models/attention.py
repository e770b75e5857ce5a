"""Attention on torch's fused kernel (megatron's own, for layers without Transformer Engine, stores all scores)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_gil.models.kernels import expands_kv_heads


class FusedAttention(torch.nn.Module):
    """softmax(q k^T / sqrt(D)) v, causal. Right padding needs no mask: no real token sees what is right of it."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,  # [Tq, B, heads, D]
        key: Tensor,  # [Tk, B, kv heads, D]
        value: Tensor,  # [Tk, B, kv heads, D]
        attention_mask: Tensor | None,  # bool, broadcasts to [B, heads, Tq, Tk]; True hides, as everywhere in megatron
        **_: Any,
    ) -> Tensor:
        """[Tq, B, heads * D]. Without a mask the queries are the last Tq of the Tk tokens, each seeing those up to
        itself; a mask replaces that rule."""
        num_queries, num_keys = query.shape[0], key.shape[0]
        visible = None if attention_mask is None else ~attention_mask
        if visible is None and 1 < num_queries < num_keys:
            visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
            visible = visible.tril(num_keys - num_queries)
        num_groups = query.shape[2] // key.shape[2]
        if key.device.type == "cuda" and expands_kv_heads(key.dtype, query.shape[2], key.shape[2]):
            key, value = (x.repeat_interleave(num_groups, dim=2) for x in (key, value))
        output = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=visible,
            is_causal=visible is None and num_queries > 1,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return output.permute(2, 0, 1, 3).flatten(2)
