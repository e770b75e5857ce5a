"""The vocabulary-parallel output layer, its gradients and entropy against torch.log_softmax on all logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_gil.config import ParallelSection
from megatron_gil.parallel import vocab
from megatron_gil.parallel.collectives import sum_over_tp
from megatron_gil.parallel.layout import start_parallel, stop_parallel
from megatron_gil.parallel.vocab import vocab_parallel_log_probs, vocab_parallel_log_probs_and_entropy
from tests.ranks import run_ranks

VOCAB_SIZE = 61  # padded to 62 at tp 2, to 64 at tp 4


HIDDEN_SIZE, NUM_POSITIONS = 6, 21


def _inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden [n, H], weight [V, H], targets [n], direction of the gradient [n])."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(NUM_POSITIONS, HIDDEN_SIZE, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=generator, dtype=torch.float64) * 2
    hidden[0] *= 300  # a softmax without its maximum taken off would overflow
    targets = torch.randint(0, VOCAB_SIZE, (NUM_POSITIONS,), generator=generator)
    targets[:3] = torch.tensor([0, 30, VOCAB_SIZE - 1])
    direction = torch.linspace(-1, 2, NUM_POSITIONS, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype), targets, direction


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    log_probs: Tensor
    with_entropy: Tensor
    entropy: Tensor
    grad_hidden: Tensor
    """Summed over ranks."""
    grad_weight: Tensor
    """This rank's part of the vocabulary."""


def _compute(tp_size: int, dtype: torch.dtype, chunk_elements: int, temperature: float = 1.0) -> Found:
    vocab._CHUNK_ELEMENTS = chunk_elements  # of this process alone
    layout = start_parallel(ParallelSection(tensor_size=tp_size), seed=1)
    hidden, weight, targets, direction = _inputs(dtype)
    width = -(-VOCAB_SIZE // tp_size)
    # Padding that would win the softmax if it took part.
    padded = torch.nn.functional.pad(weight, (0, 0, 0, width * tp_size - VOCAB_SIZE), value=1e4)
    local = padded[layout.tp_rank * width : (layout.tp_rank + 1) * width].clone().requires_grad_()
    hidden.requires_grad_()
    sizes: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "temperature": temperature}
    log_probs = vocab_parallel_log_probs(hidden, local, targets, layout.tp_pg, **sizes)
    again, entropy = vocab_parallel_log_probs_and_entropy(hidden, local, targets, layout.tp_pg, **sizes)
    assert not entropy.requires_grad
    (log_probs * direction.to(log_probs.dtype)).sum().backward()
    assert hidden.grad is not None
    assert local.grad is not None
    sum_over_tp(hidden.grad, layout)
    stop_parallel()
    return Found(
        log_probs=log_probs.detach(),
        with_entropy=again,
        entropy=entropy,
        grad_hidden=hidden.grad,
        grad_weight=local.grad,
    )


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # of ||a - b|| / ||b||; a bfloat16 number is rounded to 2^-9, and the logits are such
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)],
    ids=["float64", "float32", "bfloat16"],
)
@pytest.mark.parametrize(("temperature", "chunk_elements"), [(1.0, 200), (0.7, 200), (1.0, 1 << 22)])
def test_equals_log_softmax(
    tp_size: int, dtype: torch.dtype, tolerance: float, temperature: float, chunk_elements: int
) -> None:
    ranks: list[Found] = run_ranks(_compute, tp_size, tp_size, dtype, chunk_elements, temperature)
    hidden, weight, targets, direction = _inputs(dtype)
    whole_hidden, whole_weight = (x.double().requires_grad_() for x in (hidden, weight))
    expected = (whole_hidden @ whole_weight.T / temperature).log_softmax(-1)
    chosen = expected.gather(-1, targets[..., None])[..., 0]
    (chosen * direction).sum().backward()
    nats = -(expected.exp() * expected).sum(-1)

    def check(found: Tensor, expected: Tensor | None) -> None:
        assert expected is not None
        assert float((found.double() - expected).norm() / expected.norm()) < tolerance

    for rank in ranks:
        assert rank.log_probs.dtype == rank.entropy.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(rank.log_probs, rank.with_entropy), "scoring and updates read other log-probs"
        check(rank.log_probs, chosen.detach())
        check(rank.entropy, nats.detach())
        check(rank.grad_hidden, whole_hidden.grad)
        assert torch.equal(rank.log_probs, ranks[0].log_probs), "tensor-parallel ranks differ"
        assert rank.grad_hidden.dtype == rank.grad_weight.dtype == dtype
    grad = torch.cat([rank.grad_weight for rank in ranks])
    assert not grad[VOCAB_SIZE:].any(), "padding has a gradient"
    check(grad[:VOCAB_SIZE], whole_weight.grad)


def _gradcheck(chunk_elements: int) -> bool:
    vocab._CHUNK_ELEMENTS = chunk_elements
    layout = start_parallel(ParallelSection(), seed=1)
    hidden, weight = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (6, 7))
    targets = torch.randint(0, 5, (6,))

    def log_probs(hidden: Tensor, weight: Tensor) -> Tensor:
        return vocab_parallel_log_probs(hidden, weight, targets, layout.tp_pg, vocab_size=5, temperature=0.7)

    return torch.autograd.gradcheck(log_probs, (hidden, weight))


@pytest.mark.parametrize("chunk_elements", [14, 1 << 22], ids=["two positions a chunk", "one chunk"])
def test_gradient_by_finite_differences(chunk_elements: int) -> None:
    assert run_ranks(_gradcheck, 1, chunk_elements) == [True]
