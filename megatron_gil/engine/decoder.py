"""Decoding without megatron's modules: one position of every slot at a time, over the model's weights as plain tensors.

The trainer's model (models/transformer.py) is what defines the architecture; tests/engine/test_decoder.py compares the
two for every option of a spec. A step reads nothing on the host and takes no number that changes but the attended
length, and its buffers are made once: it can be captured as a CUDA graph.

Axes: S slots, G key-value heads of this tensor-parallel rank, R query heads to each of them, D head_dim, C columns.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_gil.engine.decoder_weights import DecoderWeights, LayerWeights
from megatron_gil.models.attention import attend, window_mask
from megatron_gil.models.families import ModelSpec
from megatron_gil.models.rope import rope_frequencies
from megatron_gil.parallel.collectives import concat_over_tp, sum_over_tp
from megatron_gil.parallel.layout import ParallelLayout


class Decoder:
    """The forward pass for `num_slots` rows, with a key-value cache of `num_columns` positions for each.

    All tensor-parallel ranks of a model copy make the same calls.
    """

    def __init__(
        self,
        weights: DecoderWeights,
        spec: ModelSpec,
        layout: ParallelLayout,
        *,
        num_slots: int,
        num_columns: int,
    ) -> None:
        self.weights, self.spec, self.layout = weights, spec, layout
        self.num_slots, self.num_columns = num_slots, num_columns
        dtype, device = weights.embedding.dtype, weights.embedding.device
        self.groups = spec.num_kv_heads // layout.tp_size
        shape = (len(weights.layers), 2, num_slots, self.groups, num_columns, spec.head_dim)
        self.cache = torch.zeros(shape, dtype=dtype, device=device)
        """Rotated keys, then values. Zeros at first: hidden columns get the weight 0, and 0 times a NaN, which memory
        that was not set may hold, would be NaN."""
        self.position = torch.zeros(num_slots, dtype=torch.int64, device=device)
        """[S] of the token that the next step feeds."""
        self.newest = torch.zeros(num_slots, dtype=torch.int64, device=device)
        """[S] that token."""
        self.mask = torch.full((num_slots, num_columns), -math.inf, dtype=dtype, device=device)
        """[S, C] added to the scores: 0 where a column is seen; in every slot at least one is."""
        self.mask[:, 0] = 0
        self._angles = _rope_table(spec, num_columns, dtype, device)
        self._prepare()

    def _prepare(self) -> None:
        """What a step works with and in, beside the state of the slots."""
        device = self.cache.device
        self._tokens = _Tokens(self.num_slots, self.weights, self.spec, self.layout)
        heads = torch.arange(self.num_slots * self.groups, device=device).view(self.num_slots, self.groups)
        self._first_lines, self._lines = heads * self.num_columns, torch.empty_like(heads)
        """[S, G] line numbers, a layer's cache seen as lines of D numbers: where each slot and head begins, and the
        line that it writes now."""
        lines = [layer.view(2, -1, self.spec.head_dim) for layer in self.cache]
        self._cache_lines = [(layer[0], layer[1]) for layer in lines]
        self._columns = torch.arange(self.num_columns, device=device)
        self._attended: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def step(self, columns: int) -> Tensor:
        """Logits [S, V] float32 (float64 for float64) after `newest` at `position`.

        columns: how many of the cache are attended; every position must lie below it, save those of idle slots.
        """
        work, position = self._tokens, self.position[:, None]
        torch.index_select(self._angles, 0, self.position, out=work.angles)
        torch.add(self._first_lines, position, out=self._lines)
        mask, lines = self._seen(position, columns), self._lines.view(-1)
        work.embed(self.newest)
        for layer, cache, (keys, values) in zip(
            self.weights.layers, self._cache_lines, self._first(columns), strict=True
        ):
            work.project(layer)
            cache[0].index_copy_(0, lines, work.keys)
            cache[1].index_copy_(0, lines, work.values)
            attended = F.scaled_dot_product_attention(work.queries, keys, values, attn_mask=mask)
            work.add_attention(attended.reshape(self.num_slots, -1), layer)
            work.add_feed_forward(layer)
        return work.logits()

    def prefill(self, tokens: Tensor, slots: Tensor) -> None:
        """The keys and values of tokens [n, W], which begin at position 0, into the cache of `slots` [n].

        Rows may be padded on the right: what lies there is written again before it is seen.
        """
        num_rows, width = tokens.shape
        work = _Tokens(tokens.numel(), self.weights, self.spec, self.layout)
        work.angles.view(num_rows, *self._angles[:width].shape).copy_(self._angles[:width])
        work.embed(tokens.flatten())
        heads, mask = work.queries.shape[2], window_mask(width, self.spec.window, tokens.device)
        for number, layer in enumerate(self.weights.layers):
            work.project(layer)
            keys, values = (
                part.view(num_rows, width, self.groups, -1).transpose(1, 2) for part in (work.keys, work.values)
            )
            self.cache[number, 0, :, :, :width].index_copy_(0, slots, keys)
            self.cache[number, 1, :, :, :width].index_copy_(0, slots, values)
            if number == len(self.weights.layers) - 1:
                break  # the rest of the last layer would only be needed for logits
            queries = work.queries.reshape(num_rows, width, self.groups * heads, -1).transpose(1, 2)
            attended = attend(queries, keys, values, mask)
            work.add_attention(attended.transpose(1, 2).reshape(num_rows * width, -1), layer)
            work.add_feed_forward(layer)

    def show(self, slots: Tensor, counts: Tensor) -> None:
        """Let the slots [n] see the first counts [n] positions, and nothing else, until they have fed more."""
        columns = torch.arange(self.num_columns, device=counts.device)
        rows = torch.where(columns < counts[:, None], 0.0, -math.inf).to(self.mask.dtype)
        self.mask.index_copy_(0, slots, rows)

    def copy(self, sources: Tensor, targets: Tensor, columns: int) -> None:
        """Copy the first columns of the cache of slots `sources` [n] to slots `targets` [n]; a slot may be in both."""
        for layer in self.cache[..., :columns, :]:
            layer.index_copy_(1, targets, layer.index_select(1, sources))

    def keep(self, slots: Tensor) -> None:
        """Go on with the slots [n] alone, which become slots 0 to n - 1."""
        self.copy(slots, torch.arange(len(slots), device=slots.device), self.num_columns)
        self.position, self.newest, self.mask = self.position[slots], self.newest[slots], self.mask[slots]
        self.cache, self.num_slots = self.cache[:, :, : len(slots)], len(slots)
        self._prepare()

    def _seen(self, position: Tensor, columns: int) -> Tensor:
        """[S, 1, 1, columns] what is added to the scores, with `position` [S, 1] seen from now on. Within a window at
        least one column is seen too, wherever an idle slot has stopped."""
        self.mask.scatter_(1, position, 0.0)
        mask, window = self.mask[:, :columns], self.spec.window
        if window is not None and window < columns:
            distance = position.clamp(max=columns - 1) - self._columns[:columns]
            mask = mask.masked_fill(distance >= window, -math.inf)
        return mask[:, None, None]

    def _first(self, columns: int) -> list[tuple[Tensor, Tensor]]:
        """Of each layer, keys and values [S, G, columns, D]. The views are kept: to make them takes time."""
        if columns not in self._attended:
            cache = self.cache[..., :columns, :]
            self._attended[columns] = [(layer[0], layer[1]) for layer in cache]
        return self._attended[columns]


class _Tokens:
    """The inside of the layers for N tokens, and the buffers for it."""

    def __init__(self, num_tokens: int, weights: DecoderWeights, spec: ModelSpec, layout: ParallelLayout) -> None:
        self._weights, self._spec, self._layout = weights, spec, layout
        dtype, device = weights.embedding.dtype, weights.embedding.device
        groups, heads = spec.num_kv_heads // layout.tp_size, spec.num_heads // spec.num_kv_heads
        size, half, inner = spec.head_dim, spec.head_dim // 2, spec.ffn_size // layout.tp_size

        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(num_tokens, *shape, dtype=dtype, device=device)

        self._hidden, self._normed = empty(spec.hidden_size), empty(spec.hidden_size)
        self._norm = empty(1, dtype=_wide(dtype))
        self._zero, self._least_norm = (
            torch.full((), number, dtype=_wide(dtype), device=device)
            for number in (0.0, math.sqrt(spec.norm_eps * spec.hidden_size))
        )
        self.angles = empty(3, half)  # cosine, minus sine, sine
        cosine, self._minus_sine, self._sine = self.angles[:, None, None].unbind(3)
        self._cosine = cosine[:, :, :, None]
        projected, rotated = empty(groups, heads + 2, 2, half), empty(groups, heads + 1, 2, half)
        self._projected, self._unrotated, self._rotated = projected.view(num_tokens, -1), projected[:, :, :-1], rotated
        self._projected_heads = projected.view(num_tokens, groups, heads + 2, size)[:, :, :-1]  # [N, G, R + 1, D]
        self._head_norm = empty(groups, heads + 1, 1, dtype=_wide(dtype))
        self._least_head_norm = torch.full((), math.sqrt(spec.norm_eps * size), dtype=_wide(dtype), device=device)
        self._halves = (*self._unrotated.unbind(3), *rotated.unbind(3))
        self.queries = rotated.view(num_tokens, groups, heads + 1, size)[:, :, :-1]  # [N, G, R, D]
        self.keys = rotated.view(num_tokens * groups, heads + 1, size)[:, -1]  # [N * G, D]
        self.values = projected.view(num_tokens * groups, heads + 2, size)[:, -1]  # [N * G, D]
        self._gate_up, self._activated = empty(2 * inner), empty(inner)
        self._gate, self._up = self._gate_up.chunk(2, dim=1)

    def embed(self, tokens: Tensor) -> None:
        table, layout = self._weights.embedding, self._layout
        if layout.tp_size == 1:
            torch.index_select(table, 0, tokens, out=self._hidden)
            return
        here = tokens - layout.tp_rank * len(table)
        is_here = (here >= 0) & (here < len(table))
        torch.index_select(table, 0, torch.where(is_here, here, 0), out=self._hidden)
        self._hidden.mul_(is_here[:, None])
        sum_over_tp(self._hidden, layout)

    def project(self, layer: LayerWeights) -> None:
        """`queries`, `keys` and `values`, rotated by `angles`."""
        self._normalize(layer.attention_norm)
        if layer.qkv_bias is None:
            torch.mm(self._normed, layer.qkv, out=self._projected)
        else:
            torch.addmm(layer.qkv_bias, self._normed, layer.qkv, out=self._projected)
        if layer.query_norm is not None and layer.key_norm is not None:
            self._normalize_heads(layer.query_norm, layer.key_norm)
        first, second, rotated_first, rotated_second = self._halves
        torch.mul(self._unrotated, self._cosine, out=self._rotated)
        rotated_first.addcmul_(second, self._minus_sine)
        rotated_second.addcmul_(first, self._sine)

    def add_attention(self, attended: Tensor, layer: LayerWeights) -> None:
        self._add_product(attended, layer.proj)

    def add_feed_forward(self, layer: LayerWeights) -> None:
        self._normalize(layer.mlp_norm)
        torch.mm(self._normed, layer.gate_up, out=self._gate_up)
        torch.mul(F.silu(self._gate), self._up, out=self._activated)
        self._add_product(self._activated, layer.down)

    def logits(self) -> Tensor:
        """[N, V] over the whole vocabulary, at least in float32."""
        self._normalize(self._weights.final_norm)
        logits = concat_over_tp(self._normed @ self._weights.head, 1, self._layout)[:, : self._spec.vocab_size]
        return logits.to(_wide(logits.dtype))

    def _add_product(self, inputs: Tensor, weight: Tensor) -> None:
        """hidden += inputs @ weight, the parts of all tensor-parallel ranks together."""
        if self._layout.tp_size == 1:
            self._hidden.addmm_(inputs, weight)
            return
        torch.mm(inputs, weight, out=self._normed)
        sum_over_tp(self._normed, self._layout)
        self._hidden.add_(self._normed)

    def _normalize(self, weight: Tensor) -> None:
        """RMSNorm, rounded where models/norm.py rounds: sqrt(H) x / hypot(|x|, sqrt(H eps)), times w; in 4 kernels."""
        torch.linalg.vector_norm(self._hidden, dim=1, keepdim=True, dtype=self._norm.dtype, out=self._norm)
        torch.hypot(self._norm, self._least_norm, out=self._norm)
        scale = math.sqrt(self._spec.hidden_size)
        torch.addcdiv(self._zero, self._hidden, self._norm, value=scale, out=self._normed)
        self._normed.mul_(weight)

    def _normalize_heads(self, query_weight: Tensor, key_weight: Tensor) -> None:
        """The same of every query and key head, in place."""
        heads, norm = self._projected_heads, self._head_norm
        torch.linalg.vector_norm(heads, dim=3, keepdim=True, dtype=norm.dtype, out=norm)
        torch.hypot(norm, self._least_head_norm, out=norm)
        torch.addcdiv(self._zero, heads, norm, value=math.sqrt(self._spec.head_dim), out=heads)
        heads[:, :, :-1].mul_(query_weight)
        heads[:, :, -1].mul_(key_weight)


def _rope_table(spec: ModelSpec, num_positions: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[positions, 3, D / 2]: cosine, minus sine and sine; the angles in float32, as megatron's."""
    positions = torch.arange(num_positions, dtype=torch.float32, device=device)
    angles = torch.outer(positions, rope_frequencies(spec, device))
    return torch.stack([angles.cos(), -angles.sin(), angles.sin()], dim=1).to(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
