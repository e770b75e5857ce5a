"""Microbatches of packed rows against a walk over every row, token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gil.engine.megatron import CUDA_TOKENS_MULTIPLE
from megatron_gil.engine.packing import Microbatch, cut
from megatron_gil.types import PreferenceBatch, TokenBatch

PAD = 0


def _rows(lengths: list[int], prompts: list[int]) -> TokenBatch:
    """Token t of row r is 100 r + t + 1; the response begins behind the prompt."""
    width = max(lengths) + 2  # a batch may be wider than its longest row
    tokens = torch.full((len(lengths), width), PAD)
    mask = torch.zeros(len(lengths), width - 1, dtype=torch.bool)
    for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        tokens[row, :length] = 100 * row + torch.arange(length) + 1
        mask[row, prompt - 1 : length - 1] = True
    lengths_of = torch.tensor(lengths)
    return TokenBatch(tokens=tokens, lengths=lengths_of, response_mask=mask, row_ids=torch.arange(len(lengths)))


def _check(microbatch: Microbatch, batch: TokenBatch) -> list[int]:
    """The rows it holds."""
    rows = torch.arange(len(batch.tokens))[microbatch.row_index].tolist()
    packed, at = microbatch.tokens[0].tolist(), 0
    predicting, last = [], []
    for place, row in enumerate(rows):
        length = int(batch.lengths[row])
        assert packed[at : at + length] == batch.tokens[row, :length].tolist()
        assert microbatch.places[place, :length].tolist() == list(range(at, at + length))
        predicting += [at + t for t in range(length - 1) if batch.response_mask[row, t]]
        last.append(at + length - 1)
        at += length
    assert set(packed[at:]) <= {PAD}
    assert microbatch.num_tokens == at
    assert microbatch.places_of(microbatch.columns()).tolist() == predicting
    assert microbatch.last_places().tolist() == last
    assert microbatch.num_responses == len(predicting) == int(microbatch.rows.response_mask.sum())
    assert microbatch.rows.tokens.shape[1] == max(int(batch.lengths[row]) for row in rows)
    used = microbatch.places[microbatch.places >= 0].tolist()
    assert used == list(range(len(packed))), "each packed token has one place, what rounds up as well"
    return rows


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=12),
    micro_size=st.integers(1, 12),
    micro_tokens=st.none() | st.integers(1, 90),
    multiple=st.sampled_from([1, 2, 64]),
)
def test_every_row_is_packed_once(lengths: list[int], micro_size: int, micro_tokens: int | None, multiple: int) -> None:
    batch = _rows(lengths, [1 + length // 3 for length in lengths])
    microbatches = cut(batch, micro_size=micro_size, micro_tokens=micro_tokens, multiple=multiple)
    found = [_check(microbatch, batch) for microbatch in microbatches]
    assert sorted(row for rows in found for row in rows) == list(range(len(lengths)))
    for rows, microbatch in zip(found, microbatches, strict=True):
        assert microbatch.tokens.shape[1] == -(-microbatch.num_tokens // multiple) * multiple
        if micro_tokens is None:
            assert len(rows) <= micro_size
        else:
            assert microbatch.num_tokens <= micro_tokens or len(rows) == 1
    in_order = [lengths[row] for rows in found for row in rows]
    assert in_order == sorted(lengths, reverse=True), "rows of like length do not go together"


def test_both_responses_of_a_pair_stay_together() -> None:
    tokens = torch.arange(1, 25).view(2, 2, 6)
    lengths = torch.tensor([[6, 2], [3, 4]])
    batch = PreferenceBatch(
        tokens=tokens,
        lengths=lengths,
        response_mask=torch.arange(1, 6) < lengths[..., None],
        row_ids=torch.arange(2),
        ref_log_probs=torch.zeros(2, 2),
    )
    first, second = cut(batch, micro_size=1, micro_tokens=8, multiple=1)
    assert first.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert second.tokens.tolist() == [[13, 14, 15, 19, 20, 21, 22]]
    assert second.last_places().tolist() == [2, 6]
    assert second.rows.response_mask.tolist() == [[[True, True, False], [True, True, True]]]


PROMPTS = (6, 16, 22, 42, 67, 94, 124, 158, 209, 292, 375, 476, 568)
RESPONSES = (8, 14, 20, 27, 35, 45, 59, 77, 111, 148, 202, 244)
"""Quantiles of HH-RLHF's lengths, measured by tools/bench_rows.py."""


@pytest.mark.parametrize("micro_tokens", [1024, 4096])
def test_rounding_up_on_a_gpu_stays_under_8_percent_at_chat_lengths(micro_tokens: int) -> None:
    lengths = [prompt + response for prompt in PROMPTS for response in RESPONSES]
    batch = _rows(lengths, [1] * len(lengths))
    microbatches = cut(batch, micro_size=1, micro_tokens=micro_tokens, multiple=CUDA_TOKENS_MULTIPLE)
    computed = sum(microbatch.tokens.numel() for microbatch in microbatches)
    assert 0 < 1 - sum(lengths) / computed < 0.08
