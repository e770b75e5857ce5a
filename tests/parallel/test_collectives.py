"""Each collective on a 2 (tensor) x 2 (pipeline) x 2 (data) or smaller world, against what plain Python says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_gil.config import ParallelSection
from megatron_gil.parallel.collectives import (
    all_agree,
    all_sum,
    any_rank,
    barrier,
    broadcast_object,
    gather_objects,
    max_over_ranks,
)
from megatron_gil.parallel.layout import start_parallel, stop_parallel
from megatron_gil.parallel.pipeline import share_from_last_pp_stage
from megatron_gil.types import Readout, TokenBatch
from tests.gathered import gather_rows
from tests.ranks import RankError, run_ranks


def _over_dp() -> dict[str, Any]:
    layout = start_parallel(ParallelSection(tensor_size=2), seed=1)
    mine = torch.full((2,), 0.1 + layout.dp_rank, dtype=torch.float64)
    total = all_sum(layout)(mine)
    rows = TokenBatch(
        tokens=torch.full((2, 3), layout.dp_rank),
        lengths=torch.tensor([1, 2]) + 10 * layout.dp_rank,
        response_mask=torch.tensor([[True, False]] * 2) ^ bool(layout.dp_rank),
        row_ids=torch.tensor([0, 1]) + 2 * layout.dp_rank,
    )
    readout = gather_rows(Readout(scores=mine), layout)
    result = {
        "layout": (layout.tp_rank, layout.dp_rank, layout.dp_size, layout.is_main),
        "sum": total.tolist(),
        "untouched": mine.tolist() == [0.1 + layout.dp_rank] * 2,
        "rows": gather_rows(rows, layout),
        "readout": (readout.scores.tolist(), readout.values),  # type: ignore[union-attr]
        "max": max_over_ranks(5 + layout.rank, layout),
        "objects": gather_objects({"rank": layout.rank}, layout),
        "broadcast": broadcast_object(["from", layout.rank], layout),
        "any": [any_rank(layout.rank == 3, layout), any_rank(False, layout)],
        "all": [all_agree(layout.rank != 3, layout), all_agree(True, layout)],
    }
    barrier(layout)
    stop_parallel()
    return result


def test_over_data_parallel_ranks_and_the_world() -> None:
    ranks = run_ranks(_over_dp, 4)
    assert [rank["layout"] for rank in ranks] == [(0, 0, 2, True), (1, 0, 2, False), (0, 1, 2, False), (1, 1, 2, False)]
    for rank in ranks:
        assert rank["sum"] == [0.1 + 1.1] * 2  # float64, not rounded to float32 on the way
        assert rank["untouched"]
        assert rank["rows"].lengths.tolist() == [1, 2, 11, 12]
        assert rank["rows"].tokens.tolist() == [[0] * 3] * 2 + [[1] * 3] * 2
        assert rank["rows"].response_mask.tolist() == [[True, False]] * 2 + [[False, True]] * 2
        assert rank["rows"].response_mask.dtype == torch.bool
        assert rank["readout"] == ([0.1, 0.1, 1.1, 1.1], None)
        assert rank["max"] == 8
        assert rank["objects"] == [{"rank": r} for r in range(4)]
        assert rank["broadcast"] == ["from", 0]
        assert rank["any"] == [True, False]
        assert rank["all"] == [False, True]


def _alone() -> bool:
    layout = start_parallel(ParallelSection(), seed=1)
    mine = torch.ones(3)
    return all_sum(layout)(mine) is not mine and any_rank(True, layout)


def test_one_rank_alone_sums_into_a_new_tensor() -> None:
    assert run_ranks(_alone, 1) == [True]


def _share() -> list[float]:
    layout = start_parallel(ParallelSection(pipeline_size=2), seed=1)
    mine = torch.arange(6.0).view(3, 2).T * (1 + layout.dp_rank) if layout.is_last_pp_stage else None
    return share_from_last_pp_stage(mine, (2, 3), torch.float32, layout).flatten().tolist()


def test_the_last_stage_shares_with_its_own_pipeline() -> None:
    once = [0.0, 2.0, 4.0, 1.0, 3.0, 5.0]
    twice = [2 * x for x in once]
    assert run_ranks(_share, 4) == [once, twice, once, twice]


def _fail_on_rank_1() -> None:
    layout = start_parallel(ParallelSection(), seed=1)
    if layout.rank == 1:
        raise ZeroDivisionError("this rank breaks")
    barrier(layout)


def test_the_harness_reports_the_rank_that_failed() -> None:
    with pytest.raises(RankError, match=r"(?s)rank \d failed.*this rank breaks|Connection"):
        run_ranks(_fail_on_rank_1, 2)
