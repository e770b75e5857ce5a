"""Any cut of the rows into microbatches gives the same loss, count, metrics and gradient."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gil.algo.groups import classifier_loss
from megatron_gil.algo.likelihood import token_nll
from megatron_gil.algo.ppo import policy_loss, value_loss
from megatron_gil.algo.preference import dpo_loss, pairwise_loss
from megatron_gil.types import LossSum

ROWS, FEATURES = 9, 5
_generator = torch.Generator().manual_seed(0)
INPUTS, OLD, ADVANTAGES, REF, COEFS = (
    torch.randn(ROWS, width, generator=_generator, dtype=torch.float64) * 0.5 for width in (FEATURES, 4, 4, 2, 3)
)
MASK = torch.rand(ROWS, 4, generator=_generator) < 0.6


def _as_loss_sum(total: torch.Tensor, rows: torch.Tensor) -> LossSum:
    return LossSum(total=total, metrics={})


# name -> (width of the model's output, loss of the outputs of some rows)
LOSSES = {
    "policy": (4, lambda x, r: policy_loss(x, OLD[r], ADVANTAGES[r], MASK[r], clip_range=0.2)),
    "value": (4, lambda x, r: value_loss(x, OLD[r], ADVANTAGES[r], MASK[r], value_clip_range=0.2)),
    "nll": (4, lambda x, r: token_nll(x, MASK[r])),
    "pairwise": (2, lambda x, r: pairwise_loss(x)),
    "dpo": (2, lambda x, r: dpo_loss(x, REF[r], beta=0.3, label_smoothing=0.1)),
    "classifier": (3, lambda x, r: _as_loss_sum(classifier_loss(x, COEFS[r]), x)),
}


def accumulated(name, rows_of_pieces):
    """Gradient of a linear model's weights, and the sums, accumulated over microbatches as an engine does."""
    width, loss_fn = LOSSES[name]
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(FEATURES, width, generator=generator, dtype=torch.float64).requires_grad_()
    sums: dict[str, float] = {}
    for rows in rows_of_pieces:
        loss = loss_fn(INPUTS[rows] @ weight, rows)
        loss.total.backward()
        for key, value in {"total": loss.total, **loss.metrics}.items():
            sums[key] = sums.get(key, 0.0) + value.item()
    assert weight.grad is not None
    return weight.grad, sums


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(ROWS)), sizes=st.lists(st.integers(1, 4), min_size=ROWS, max_size=ROWS))
def test_same_gradient_for_any_cut_and_order(name, order, sizes):
    ends = [end for end in accumulate(sizes) if end < ROWS]
    pieces = [torch.tensor(order[a:b]) for a, b in zip([0, *ends], [*ends, ROWS], strict=True)]
    gradient, sums = accumulated(name, pieces)
    whole_gradient, whole_sums = accumulated(name, [torch.arange(ROWS)])
    assert whole_gradient.abs().max() > 1e-3
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-12, atol=1e-13)
    assert sums == pytest.approx(whole_sums, rel=1e-12, abs=1e-13)
