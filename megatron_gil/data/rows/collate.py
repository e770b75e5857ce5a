"""Rows of token ids to right-padded tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_tokens(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """tokens [B, T] int64 and lengths [B] int64; T is the longest row."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    tokens = torch.full((len(rows), int(lengths.max())), pad_id, dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return tokens, lengths


def pad_response_mask(is_response: Sequence[Sequence[bool]], length: int) -> Tensor:
    """response_mask [B, T - 1] from flags per token: column t speaks of token t + 1."""
    mask = torch.zeros(len(is_response), length - 1, dtype=torch.bool)
    for i, flags in enumerate(is_response):
        mask[i, : len(flags) - 1] = torch.tensor(flags[1:], dtype=torch.bool)
    return mask
