"""Attention on torch's fused kernel (megatron's own, for layers without Transformer Engine, stores all scores), with a
cache of rotated keys for decoding."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_gil.models.kernels import expands_kv_heads


class PromptContext(StaticInferenceContext):
    """The key-value cache for prompts of different lengths, padded on the right to P, that are continued in step.

    The first W = P - 1 columns hold the prompts; column W + j holds row i's token number lengths[i] - 1 + j. The last
    token of each prompt is thus fed again, alone: its logits are those of the first token to choose, for every row in
    the same place. Feed tokens[:, :W] without a mask (nothing where W is 0), then one token a step with `hidden()`.
    """

    def __init__(self, lengths: Tensor, prompt_width: int, max_new_tokens: int) -> None:
        super().__init__(len(lengths), prompt_width - 1 + max_new_tokens)
        self.lengths = lengths
        self.prompt_columns = prompt_width - 1

    def hidden(self) -> Tensor:
        """[B, 1, 1, columns so far and the next] bool: padding, and each prompt's last token, fed again later."""
        columns = torch.arange(self.sequence_len_offset + 1, device=self.lengths.device)
        return ((columns >= self.lengths[:, None] - 1) & (columns < self.prompt_columns))[:, None, None, :]

    def angles(self, all_angles: Tensor, start: int, stop: int) -> Tensor:
        """RoPE's angles of columns [start, stop): [stop - start, B or 1, 1, D], of all_angles [positions, 1, 1, D]."""
        if stop <= self.prompt_columns:
            return all_angles[start:stop]
        columns = torch.arange(start, stop, device=self.lengths.device)
        positions = columns[:, None] - self.prompt_columns + self.lengths - 1
        return all_angles[positions, 0]


class CachedSelfAttention(SelfAttention):
    """megatron's self-attention, except that the cache holds rotated keys: megatron's rotates all of them at each step,
    by their column. A PromptContext says which position a column holds; any other static context, its own number."""

    def _adjust_key_value_for_inference(
        self,
        inference_context: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary_pos_emb: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        rotary: tuple[Tensor, None] | None = rotary_pos_emb
        if inference_context is not None:
            start = inference_context.sequence_len_offset
            stop = start + key.shape[0]
            is_prompt = isinstance(inference_context, PromptContext)
            find = inference_context.angles if is_prompt else _angles_by_column
            angles = find(rotary_pos_emb[0], start, stop)
            key = apply_rotary_pos_emb(key, angles, config=self.config)
            rotary_pos_emb, rotary = None, (angles, None)
        super_adjust: Any = super()._adjust_key_value_for_inference
        query, key, value, _, mask_type, block_table = super_adjust(
            inference_context, query, key, value, rotary_pos_emb, *args, **kwargs
        )
        return query, key, value, rotary, mask_type, block_table


def _angles_by_column(all_angles: Tensor, start: int, stop: int) -> Tensor:
    return all_angles[start:stop]


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
