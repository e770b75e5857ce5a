"""Which responses are said to several prompts: found on the device, so that the host need not wait for the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_gil.types import AllSum, Rollout

_TOKEN, _PLACE, _MIX = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB
"""Odd numbers whose multiples, modulo 2 ** 64, are spread over all of int64."""


def response_codes(rollout: Rollout) -> Tensor:
    """[B] int64: equal where two responses have the same tokens, whatever their prompts and padding. Others share one
    by chance, in about one pair of 2 ** 64."""
    columns = torch.arange(rollout.tokens.shape[1], device=rollout.tokens.device)
    places = columns - rollout.prompt_lengths[:, None]
    is_response = (places >= 0) & (columns < rollout.lengths[:, None])
    mixed = rollout.tokens * _TOKEN + (places + 1) * _PLACE  # overflow is meant
    for _ in range(2):
        mixed = (mixed ^ (mixed >> 31)) * _MIX
    return torch.where(is_response, mixed ^ (mixed >> 31), 0).sum(1)


def repeats_another(rollout: Rollout, *, dp_rank: int, dp_size: int, all_sum: AllSum) -> Tensor:
    """[B] bool: whether a response of the global batch to another prompt is the same. Every rank has as many rows."""
    mine = torch.stack([response_codes(rollout), rollout.row_ids], dim=1)
    parts = mine.new_zeros(dp_size, *mine.shape)
    parts[dp_rank] = mine
    codes, prompts = all_sum(parts).flatten(0, 1).unbind(1)
    return ((mine[:, :1] == codes) & (mine[:, 1:] != prompts)).any(1)
