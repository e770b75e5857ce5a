"""Attention and norm against megatron's and transformers' own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from megatron_gil.models.attention import RowAttention, RowLayout
from megatron_gil.models.norm import RMSNorm
from tests.models.running import LAYOUTS, load_model, parallel
from tests.models.tiny import make_model
from tests.ranks import run_ranks

TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-2}  # rounding of another order of sums


LENGTHS = [(12, 12, 12), (5, 12, 1)]
FREQUENCIES = torch.tensor([1.0, 0.1, 0.01, 0.001])


def _compare_attention(hf_dir: Path, dtype: torch.dtype, lengths: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """(ours, megatron's with its own rotary embedding) of the output and the three gradients, one row at a time."""
    with parallel(LAYOUTS[0]) as layout:
        config = load_model(hf_dir, layout, dtype=dtype)[1].config
        ours, theirs = (
            RowAttention(config, layout=RowLayout(FREQUENCIES)),
            DotProductAttention(config, 1, AttnMaskType.causal, "self"),
        )
        generator = torch.Generator().manual_seed(11)
        sizes = [(sum(lengths), 1, heads, 8) for heads in (4, 2, 2)]
        base = [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]
        column = torch.arange(max(lengths))
        ends = torch.tensor(lengths).cumsum(0)
        starts = ends - torch.tensor(lengths)
        places = torch.where(column < (ends - starts)[:, None], starts[:, None] + column, -1)
        angles = torch.outer(column, torch.cat([FREQUENCIES, FREQUENCIES]))[:, None, None]

        def row_by_row(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            outputs = []
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
                q, k, v = (x[start:end] for x in (query, key, value))
                q, k = (_apply_rotary_pos_emb_bshd(x, angles[: end - start]) for x in (q, k))
                outputs.append(theirs(q, k, v, None))
            return torch.cat(outputs)

        results = []
        for attention in (lambda *inputs: ours(*inputs, places), row_by_row):
            inputs = [tensor.clone().requires_grad_() for tensor in base]
            output = attention(*inputs)
            (output * torch.linspace(-1, 1, output.numel()).view_as(output).to(dtype)).sum().backward()
            results.append([output.detach(), *(tensor.grad for tensor in inputs)])
        return list(zip(*results, strict=True))


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    make_model(path)
    return path


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_rows_attend_as_megatrons_do(dtype: torch.dtype, lengths: tuple[int, ...], llama_dir: Path) -> None:
    for ours, theirs in run_ranks(_compare_attention, 1, llama_dir, dtype, lengths)[0]:
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype == dtype
        # relative to the largest element
        torch.testing.assert_close(ours, theirs, atol=TOLERANCES[dtype] * float(theirs.abs().max()), rtol=0)


@pytest.mark.parametrize("window", [None, 1, 2, 3])
def test_a_token_sees_its_window_and_nothing_else(window: int | None) -> None:
    """No other row, and nothing after it."""
    config: Any = None
    attention = RowAttention(config, layout=RowLayout(FREQUENCIES, window))
    places = torch.tensor([[0, 1, -1], [2, 3, 4]])
    base = [torch.randn(5, 1, heads, 8, dtype=torch.float64) for heads in (4, 2, 2)]
    before = attention(*base, places)
    for token in range(5):
        changed = [x.clone() for x in base]
        for x in changed:
            x[token] += 1
        moved = (attention(*changed, places) != before).flatten(1).any(1).tolist()
        row = range(2) if token < 2 else range(2, 5)
        seen_by = row[row.index(token) :][:window]
        assert moved == [other in seen_by for other in range(5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_equals_transformers_bit_for_bit(dtype: torch.dtype) -> None:
    config: Any = SimpleNamespace(params_dtype=dtype, sequence_parallel=True)
    ours, theirs = RMSNorm(config, 48, eps=1e-5), LlamaRMSNorm(48, eps=1e-5).to(dtype)
    with torch.no_grad():
        ours.weight.uniform_(0.5, 1.5)
        theirs.weight.copy_(ours.weight)
    x = torch.randn(5, 3, 48).to(dtype) * 3
    assert torch.equal(ours(x), theirs(x))
    assert ours.weight.sequence_parallel  # type: ignore[attr-defined]


def test_rms_norm_keeps_float64() -> None:
    config: Any = SimpleNamespace(params_dtype=torch.float64, sequence_parallel=False)
    x = torch.randn(5, 48, dtype=torch.float64)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(RMSNorm(config, 48, eps=1e-6)(x), expected, atol=1e-15, rtol=1e-15)
