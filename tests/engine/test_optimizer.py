"""Several updates: against torch's AdamW on a plain transformers model, and the same weights at every layout.

Adam's quotient m / (sqrt(v) + eps) blows rounding errors of tiny gradients up to whole steps; eps is large here, so
that weights can be compared.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from megatron_gil.config import OptimizerSection
from megatron_gil.engine import megatron as engine
from megatron_gil.engine.megatron import TrainableModel
from megatron_gil.engine.optimizer import learning_rate
from megatron_gil.engine.protocol import Part
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.training.supervised.objectives import sft_loss
from megatron_gil.types import TokenBatch, take_rows
from tests.ranks import run_ranks
from tests.training.running import (
    DP2,
    ONE,
    PP2,
    TP2,
    build,
    full_weights,
    merge,
    parallel,
    world_size,
)

NUM_UPDATES, NUM_ROWS = 5, 8
SECTION = OptimizerSection(
    lr=1e-2, min_lr=1e-3, warmup_fraction=0.4, weight_decay=0.1, clip_grad=0.5, beta1=0.8, beta2=0.9, eps=1e-3
)
UNCLIPPED = OptimizerSection(lr=1e-2, warmup_fraction=0.0, clip_grad=0.0)
TOLERANCE = 2e-6  # of ||a - b|| / ||b|| per tensor: float32 sums in another order, over five updates
TP2_DP2 = {**TP2, "world": 4}
PP2_DP2 = {**PP2, "world": 4}


def _batch(update: int) -> TokenBatch:
    generator = torch.Generator().manual_seed(update)
    tokens = torch.randint(4, 61, (NUM_ROWS, 13), generator=generator)
    return TokenBatch(
        tokens=tokens,
        lengths=torch.full((NUM_ROWS,), 13),
        response_mask=torch.rand(NUM_ROWS, 12, generator=generator) < 0.6,
        row_ids=torch.arange(NUM_ROWS),
    )


def _train(
    root: Path, layout: ParallelLayout, section: OptimizerSection, distributed: bool, overlap: bool
) -> tuple[dict[str, Tensor], list[float]]:
    """(weights, gradient norms) after the updates, each on all rows over the data-parallel ranks."""
    model: TrainableModel = build(
        root / "policy",
        layout,
        "lm",
        kind=TrainableModel,
        micro_size=2,
        optimizer=section,
        distributed_optimizer=distributed,
        overlap=overlap,
    )
    share = NUM_ROWS // layout.dp_size
    norms = []
    for update in range(NUM_UPDATES):
        mine = take_rows(_batch(update), slice(layout.dp_rank * share, (layout.dp_rank + 1) * share))
        lr = learning_rate(section, update=update, num_updates=NUM_UPDATES)
        norms.append(model.update(Part(batch=mine, loss_fn=sft_loss), lr=lr).metrics["gradient_norm"])
    return full_weights(model), norms


def _both_sections(layout: dict[str, Any], root: Path, distributed: bool, overlap: bool) -> Any:
    engine.BUCKET_SIZE = 2000 if overlap else None  # several sums under way at once; of this process alone
    with parallel(layout) as started:
        clipped = _train(root, started, SECTION, distributed, overlap)
        return clipped, _train(root, started, UNCLIPPED, distributed, overlap)


def _run(
    layout: dict[str, Any], world: Path, distributed: bool, overlap: bool = False
) -> tuple[dict[str, Tensor], list[float], Any]:
    """(clipped weights, their gradient norms, unclipped weights)."""
    ranks = run_ranks(_both_sections, world_size(layout), layout, world, distributed, overlap)
    assert all(rank[0][1] == ranks[0][0][1] for rank in ranks), "ranks see other gradient norms"
    return merge([rank[0][0] for rank in ranks]), ranks[0][0][1], merge([rank[1][0] for rank in ranks])


@pytest.fixture(scope="module")
def one_rank(world: Path) -> Any:
    return _run(ONE, world, False)


@pytest.fixture(scope="module")
def data_parallel(world: Path) -> Any:
    return _run(DP2, world, False)


def _worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).norm() / expected[n].norm()) for n in expected)


def test_equals_torch_adamw_on_transformers(world: Path, one_rank: Any) -> None:
    model = LlamaForCausalLM.from_pretrained(world / "policy")
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]  # megatron decays no vector
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        betas=(0.8, 0.9),
        eps=1e-3,
    )
    seen = []
    for update in range(NUM_UPDATES):
        batch = _batch(update)
        log_probs = model(batch.tokens).logits[:, :-1].log_softmax(-1).gather(-1, batch.tokens[:, 1:, None])[..., 0]
        loss = -log_probs[batch.response_mask].mean()
        optimizer.zero_grad()
        loss.backward()
        seen.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        for group in optimizer.param_groups:
            group["lr"] = [0.005, 0.01, 0.01, 0.00775, 0.00325][update]  # 2 of warm-up, then 3 of the cosine
        optimizer.step()
    weights, found_norms, _ = one_rank
    assert min(seen) > 0.5, "clipping is not at work"
    assert found_norms == pytest.approx(seen, rel=1e-5)
    error = _worst(weights, {name: p.detach() for name, p in model.named_parameters()})
    print(f"weights after {NUM_UPDATES} updates: {error:.1e}")
    assert error < TOLERANCE


@pytest.mark.parametrize(
    ("layout", "distributed"),
    [(DP2, False), (DP2, True), (TP2_DP2, True)],
    ids=["dp2", "dp2_distributed", "tp2_dp2_distributed"],
)
def test_the_same_weights_at_every_layout(
    layout: dict[str, Any], distributed: bool, world: Path, one_rank: Any, data_parallel: Any
) -> None:
    found = data_parallel if (layout, distributed) == (DP2, False) else _run(layout, world, distributed)
    error = _worst(found[0], one_rank[0])
    print(f"weights after {NUM_UPDATES} updates: {error:.1e}")
    assert error < TOLERANCE
    if layout == DP2:
        # Two ranks' sum has no order, and without clipping nothing else is shared: the shards change no bit.
        assert all(torch.equal(found[2][name], data_parallel[2][name]) for name in data_parallel[2])


@pytest.mark.parametrize(
    ("layout", "distributed"), [(DP2, False), (DP2, True), (PP2_DP2, True)], ids=["dp2", "dp2_distributed", "pp2_dp2"]
)
def test_overlap_changes_no_bit(layout: dict[str, Any], distributed: bool, world: Path) -> None:
    plain, overlapped = (_run(layout, world, distributed, overlap) for overlap in (False, True))
    assert all(torch.equal(overlapped[2][name], plain[2][name]) for name in plain[2])
    # Shards are cut from each sum apart: the squares of the gradient norm, which clips, are added in another order.
    assert overlapped[1] == (pytest.approx(plain[1], rel=1e-6) if distributed else plain[1])
    assert distributed or all(torch.equal(overlapped[0][name], plain[0][name]) for name in plain[0])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedule(schedule: Any) -> None:
    section = OptimizerSection(lr=1.0, min_lr=0.2, schedule=schedule, warmup_fraction=0.2)
    rates = [learning_rate(section, update=update, num_updates=10) for update in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    halfway = {"constant": 1.0, "linear": 0.6, "cosine": 0.6}[schedule]
    assert rates[6] == pytest.approx(halfway)
    assert all(a >= b for a, b in itertools.pairwise(rates[1:]))
    end = learning_rate(section, update=10, num_updates=10)
    assert end == pytest.approx(1.0 if schedule == "constant" else 0.2)


def test_no_warm_up_starts_at_the_full_rate() -> None:
    section = OptimizerSection(lr=1.0, warmup_fraction=0.0)
    assert learning_rate(section, update=0, num_updates=1) == 1.0
