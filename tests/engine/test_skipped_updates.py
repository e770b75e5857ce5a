"""A loss that is not a number stops the update on every rank alike, and is accounted for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_gil.config import OptimizerSection
from megatron_gil.engine.megatron import TrainableModel
from megatron_gil.engine.protocol import Part
from megatron_gil.training.supervised.objectives import sft_loss
from megatron_gil.types import LossSum, Readout, TokenBatch, take_rows
from tests.ranks import run_ranks
from tests.training.running import (
    DP2,
    ONE,
    PP2,
    TP2,
    build,
    full_weights,
    layout_name,
    merge,
    parallel,
    world_size,
)

NUM_ROWS, BAD_ROW = 8, 6


def _loss(readout: Readout, rows: TokenBatch) -> LossSum:
    """SFT's, but NaN for the microbatch that holds BAD_ROW."""
    loss = sft_loss(readout, rows)
    is_bad = bool((rows.row_ids == BAD_ROW).any())
    return LossSum(total=loss.total * (torch.nan if is_bad else 1.0), metrics=loss.metrics)


def _updates(layout: dict[str, Any], root: Path, distributed: bool) -> dict[str, Any]:
    """Good, bad, good; and without the bad one."""
    with parallel(layout) as started:
        found: dict[str, Any] = {}
        for name, losses in {"skipped": (sft_loss, _loss, sft_loss), "never": (sft_loss, sft_loss)}.items():
            model: TrainableModel = build(
                root / "policy",
                started,
                "lm",
                kind=TrainableModel,
                micro_size=2,
                optimizer=OptimizerSection(clip_grad=1.0),
                distributed_optimizer=distributed,
            )
            metrics = [model.update(Part(batch=_rows(started), loss_fn=loss_fn), lr=1e-2).metrics for loss_fn in losses]
            found[name] = {
                "weights": full_weights(model),
                "skipped": [m["skipped"] for m in metrics],
                "why": [str(why) for why in model.take_skipped()],
                "again": model.take_skipped(),
                "num_steps": model.num_steps,
            }
        return found


def _rows(layout: Any) -> TokenBatch:
    generator = torch.Generator().manual_seed(4)
    batch = TokenBatch(
        tokens=torch.randint(4, 61, (NUM_ROWS, 9), generator=generator),
        lengths=torch.full((NUM_ROWS,), 9),
        response_mask=torch.ones(NUM_ROWS, 8, dtype=torch.bool),
        row_ids=torch.arange(NUM_ROWS),
    )
    share = NUM_ROWS // layout.dp_size
    return take_rows(batch, slice(layout.dp_rank * share, (layout.dp_rank + 1) * share))


@pytest.mark.parametrize(
    ("layout", "distributed"),
    [(ONE, False), (TP2, False), (PP2, False), (DP2, False), (DP2, True)],
    ids=lambda value: layout_name(value) if isinstance(value, dict) else "distributed" if value else "",
)
def test_a_bad_batch_changes_nothing(layout: dict[str, Any], distributed: bool, world: Path) -> None:
    """The weights after good, bad, good are those after good, good: not even Adam's count of steps moved."""
    ranks = run_ranks(_updates, world_size(layout), layout, world, distributed)
    found: dict[str, dict[str, Tensor]] = {n: merge([rank[n]["weights"] for rank in ranks]) for n in ranks[0]}
    assert all(torch.equal(found["skipped"][name], found["never"][name]) for name in found["never"])
    # On two data-parallel ranks row 6 lies in the second rank's second microbatch, of four rows.
    rank, microbatch = {"tp1_pp1_dp2": (1, 1), "tp1_pp2_dp1": (1, 3)}.get(layout_name(layout), (0, 3))
    for told in (rank["skipped"] for rank in ranks):
        assert told["skipped"] == [0.0, 1.0, 0.0]
        assert told["num_steps"] == 2
        (why,) = told["why"]
        assert f"rank {rank}: gradient norm nan, loss of microbatch {microbatch} (rows [6, 7])" in why
        assert ", gradient of " in why
        assert told["again"] == []
    assert ranks[0]["never"]["skipped"] == [0.0, 0.0]
