"""Rows without padding: the cut of a batch into microbatches, and each microbatch as one sequence of real tokens.

Where rows lie in that sequence is known to the host from one reading of their lengths; everything else stays on the
device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_gil.models.attention import packed_order
from megatron_gil.types import take_rows, trim


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """Some rows of a batch, and how the layers see them: R sequences (two of each pair), N tokens of all."""

    rows: Any
    """The batch's rows, padded to the longest of them."""
    row_index: Tensor
    """Which rows of the batch they are."""
    tokens: Tensor
    """[1, N] the real tokens, row after row; the last row goes on into its padding where N is rounded up."""
    places: Tensor
    """[R, W] where each token of a row lies among the N; -1 behind its end."""
    num_responses: int
    """Response tokens."""
    num_tokens: int
    """Real tokens, at most N."""

    def columns(self) -> Tensor:
        """[n] which of the R x S columns speak of response tokens, in order."""
        mask = self.rows.response_mask.flatten()
        return (~mask).to(torch.uint8).argsort(stable=True)[: self.num_responses]

    def places_of(self, columns: Tensor) -> Tensor:
        """Where the token lies whose hidden state predicts each column's."""
        width = self.rows.tokens.shape[-1]
        return self.places[:, : width - 1].flatten()[columns]

    def last_places(self) -> Tensor:
        """[R] where the last real token of each row lies."""
        lengths = self.rows.lengths.flatten()
        return self.places.gather(1, lengths[:, None] - 1).squeeze(1)


def cut(batch: Any, *, micro_size: int, micro_tokens: int | None, multiple: int) -> list[Microbatch]:
    """The batch in microbatches, the longest rows first: attention lays rows out as wide as the longest beside them.

    Each has `micro_size` rows, or as many as have at most `micro_tokens` tokens, a longer row by itself. multiple: N of
    each is rounded up to it.
    """
    lengths = batch.lengths.reshape(len(batch.lengths), -1)  # [B, 1], or [B, 2] of pairs
    row_index = lengths.sum(1).argsort(descending=True, stable=True)
    sizes = sorted(_read_sizes(lengths, batch.response_mask), key=lambda size: -size.num_tokens)  # in the same order
    if micro_tokens is None:
        ends = [*range(micro_size, len(sizes), micro_size), len(sizes)]
    else:
        ends = list(_fill([size.num_tokens for size in sizes], micro_tokens))
    batch = take_rows(batch, row_index)
    cuts = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    return [_pack(take_rows(batch, some), sizes[some], row_index[some], multiple) for some in cuts]


@dataclass(frozen=True, slots=True)
class _Size:
    """Of one row: real tokens of each of its sequences, and response tokens of all."""

    lengths: tuple[int, ...]
    num_responses: int

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)


def _read_sizes(lengths: Tensor, response_mask: Tensor) -> list[_Size]:
    responses = response_mask.flatten(1).sum(1, keepdim=True)
    return [_Size(tuple(row[:-1]), row[-1]) for row in torch.cat([lengths, responses], dim=1).tolist()]


def _fill(num_tokens: list[int], most: int) -> Iterator[int]:
    """Where microbatches end if each takes rows in their order for as long as they fit."""
    total = 0
    for row, count in enumerate(num_tokens):
        if row and total + count > most:
            yield row
            total = 0
        total += count
    yield len(num_tokens)


def _pack(rows: Any, sizes: list[_Size], row_index: Tensor, multiple: int) -> Microbatch:
    host_lengths = [length for size in sizes for length in size.lengths]
    longest, num_tokens = max(host_lengths), sum(host_lengths)
    rows = trim(rows, longest)
    tokens, lengths = rows.tokens.flatten(0, -2), rows.lengths.flatten()
    extra = -num_tokens % multiple
    if extra:
        lengths = torch.cat([lengths[:-1], lengths[-1:] + extra])
        tokens = pad(tokens, (0, max(0, host_lengths[-1] + extra - longest)))
    column = torch.arange(tokens.shape[1], device=tokens.device)
    starts = lengths.cumsum(0) - lengths
    places = torch.where(column < lengths[:, None], starts[:, None] + column, -1)
    if num_tokens + extra < places.numel():
        packed = tokens.flatten()[packed_order(places, num_tokens + extra)]
    else:
        packed = tokens.flatten()
    return Microbatch(
        rows=rows,
        row_index=row_index,
        tokens=packed[None],
        places=places,
        num_responses=sum(size.num_responses for size in sizes),
        num_tokens=num_tokens,
    )
