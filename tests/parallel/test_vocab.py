"""Vocabulary-parallel log-probs, gradient and entropy against torch.log_softmax on the whole vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_gil.config import ParallelSection
from megatron_gil.parallel import vocab
from megatron_gil.parallel.layout import start_parallel, stop_parallel
from megatron_gil.parallel.vocab import vocab_parallel_entropy, vocab_parallel_log_probs
from tests.ranks import run_ranks

VOCAB_SIZE = 61  # padded to 62 at tp 2, to 64 at tp 4


def _inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 7, VOCAB_SIZE, generator=generator, dtype=torch.float64) * 4
    logits[0, 0] += 1e3  # a softmax without its maximum taken off would overflow
    targets = torch.randint(0, VOCAB_SIZE, (3, 7), generator=generator)
    targets[0, :3] = torch.tensor([0, 30, VOCAB_SIZE - 1])
    return logits.to(dtype), targets, torch.linspace(-1, 2, 21, dtype=torch.float64).view(3, 7)


def _compute(
    tp_size: int, dtype: torch.dtype, chunk_elements: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropy, and this rank's columns of the logits' gradient."""
    vocab._CHUNK_ELEMENTS = chunk_elements  # of this process alone
    layout = start_parallel(ParallelSection(tensor_size=tp_size), seed=1)
    logits, targets, direction = _inputs(dtype)
    width = -(-VOCAB_SIZE // tp_size)
    # Padding that would win the softmax if it took part.
    padded = torch.nn.functional.pad(logits, (0, width * tp_size - VOCAB_SIZE), value=1e4)
    local = padded[..., layout.tp_rank * width : (layout.tp_rank + 1) * width].clone().requires_grad_()
    log_probs = vocab_parallel_log_probs(local, targets, layout.tp_pg, vocab_size=VOCAB_SIZE, temperature=temperature)
    entropy = vocab_parallel_entropy(local, layout.tp_pg, vocab_size=VOCAB_SIZE, temperature=temperature)
    assert not entropy.requires_grad
    (log_probs * direction.to(log_probs.dtype)).sum().backward()
    stop_parallel()
    assert local.grad is not None
    return log_probs.detach(), entropy, local.grad


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # of the gradient: a bfloat16 one is rounded once, to 2^-9
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)],
    ids=["float64", "float32", "bfloat16"],
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_log_softmax(tp_size: int, dtype: torch.dtype, tolerance: float, temperature: float) -> None:
    ranks: Any = run_ranks(_compute, tp_size, tp_size, dtype, 200, temperature)  # a few rows a chunk
    logits, targets, direction = _inputs(dtype)
    whole = logits.double().requires_grad_()
    expected = (whole / temperature).log_softmax(-1)
    chosen = expected.gather(-1, targets[..., None])[..., 0]
    (chosen * direction).sum().backward()
    nats = -(expected.exp() * expected).sum(-1)
    result_dtype = torch.promote_types(dtype, torch.float32)
    forward_tolerance = min(tolerance, 1e-6)
    for log_probs, entropy, _ in ranks:
        assert log_probs.dtype == entropy.dtype == result_dtype
        torch.testing.assert_close(log_probs.double(), chosen.detach(), atol=forward_tolerance, rtol=forward_tolerance)
        torch.testing.assert_close(entropy.double(), nats.detach(), atol=forward_tolerance, rtol=forward_tolerance)
        assert torch.equal(log_probs, ranks[0][0]), "tensor-parallel ranks differ"
    grad = torch.cat([rank[2] for rank in ranks], dim=-1)
    assert grad.dtype == dtype
    assert not grad[..., VOCAB_SIZE:].any(), "padding has a gradient"
    torch.testing.assert_close(grad[..., :VOCAB_SIZE].double(), whole.grad, atol=tolerance, rtol=tolerance)


def test_chunks_change_no_bit() -> None:
    few, many = (run_ranks(_compute, 1, 1, torch.float32, elements)[0] for elements in (1, 1 << 22))
    assert all(torch.equal(a, b) for a, b in zip(few, many, strict=True))


def _gradcheck() -> bool:
    layout = start_parallel(ParallelSection(), seed=1)
    logits = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 5, (2, 3))
    return torch.autograd.gradcheck(
        lambda x: vocab_parallel_log_probs(x[:, :, :], targets, layout.tp_pg, vocab_size=5), (logits,)
    )


def test_gradient_by_finite_differences() -> None:
    assert run_ranks(_gradcheck, 1) == [True]
