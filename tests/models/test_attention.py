"""Attention and norm against megatron's and transformers' own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from megatron_gil.models.attention import FusedAttention
from megatron_gil.models.norm import RMSNorm
from tests.models.running import LAYOUTS, load_model, parallel
from tests.models.tiny import make_llama
from tests.ranks import run_ranks

TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-2}  # rounding of another order of sums


def _compare_attention(hf_dir: Path, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """(ours, megatron's) of the output and the three gradients."""
    with parallel(LAYOUTS[0]) as layout:
        config = load_model(hf_dir, layout, dtype=dtype)[1].config
        theirs = DotProductAttention(config, 1, AttnMaskType.causal, "self")
        generator = torch.Generator().manual_seed(11)
        sizes = [(12, 3, heads, 8) for heads in (4, 2, 2)]
        base = [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]
        results = []
        for attention in (FusedAttention(config), theirs):
            inputs = [tensor.clone().requires_grad_() for tensor in base]
            output = attention(*inputs, None)
            (output * torch.linspace(-1, 1, output.numel()).view_as(output).to(dtype)).sum().backward()
            results.append([output.detach(), *(tensor.grad for tensor in inputs)])
        return list(zip(*results, strict=True))


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    make_llama(path)
    return path


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_fused_attention_equals_megatrons(dtype: torch.dtype, llama_dir: Path) -> None:
    for ours, theirs in run_ranks(_compare_attention, 1, llama_dir, dtype)[0]:
        assert ours.dtype == theirs.dtype == dtype
        # relative to the largest element
        torch.testing.assert_close(ours, theirs, atol=TOLERANCES[dtype] * float(theirs.abs().max()), rtol=0)


def test_queries_are_the_last_of_the_keys() -> None:
    """Three new tokens behind nine cached ones see what the last three of twelve see."""
    config: Any = None
    attention = FusedAttention(config)
    query, key, value = (torch.randn(12, 2, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    whole = attention(query, key, value, None)
    torch.testing.assert_close(attention(query[9:], key, value, None), whole[9:], atol=1e-14, rtol=0)
    torch.testing.assert_close(attention(query[11:], key, value, None), whole[11:], atol=1e-14, rtol=0)


def test_a_mask_hides_where_it_is_true() -> None:
    config: Any = None
    query, key, value = (torch.randn(n, 1, 2, 8, dtype=torch.float64) for n in (1, 5, 5))
    hidden = torch.tensor([False, True, False, True, False])
    masked = FusedAttention(config)(query, key, value, hidden.view(1, 1, 1, 5))
    without = FusedAttention(config)(query, key[~hidden], value[~hidden], None)
    torch.testing.assert_close(masked, without, atol=1e-14, rtol=0)


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
