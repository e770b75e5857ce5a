import json
import math
import random
import statistics
from dataclasses import asdict

import pytest
import torch

from megatron_gil.algo.masked import ScoreMoments, masked_mean, masked_sum, whiten

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def batch(seed, dtype, rows=7, cols=5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator, dtype=torch.float64) * 3 + 10
    mask = torch.rand(rows, cols, generator=generator) < 0.6
    return x.to(dtype), mask


def picked(x, mask):
    return [v for row, keep in zip(x.tolist(), mask.tolist(), strict=True) for v, k in zip(row, keep, strict=True) if k]


@BOTH
def test_masked_sum_and_mean_are_the_loops(dtype, one_rank):
    x, mask = batch(0, dtype)
    wanted = picked(x, mask)
    assert masked_sum(x, mask).item() == pytest.approx(math.fsum(wanted), rel=1e-6 if dtype == torch.float32 else 1e-14)
    mean = masked_mean(x, mask, all_sum=one_rank)
    assert mean.dtype == torch.float64
    assert mean.item() == pytest.approx(statistics.fmean(wanted), rel=1e-14)


def test_nan_outside_the_mask_reaches_neither_sum_nor_gradient(one_rank):
    x = torch.tensor([1.0, math.nan, 3.0], requires_grad=True)
    mask = torch.tensor([True, False, True])
    total = masked_sum(x, mask)
    total.backward()
    assert total.item() == 4
    assert x.grad is not None
    assert x.grad.tolist() == [1, 0, 1]
    assert masked_mean(x, mask, all_sum=one_rank).item() == 2
    assert whiten(x, mask, all_sum=one_rank).isfinite().all()


def test_an_empty_mask_gives_zeros(one_rank):
    x, mask = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    assert masked_sum(x, mask).item() == 0
    assert masked_mean(x, mask, all_sum=one_rank).item() == 0
    assert whiten(x, mask, all_sum=one_rank).tolist() == torch.zeros(2, 3).tolist()


@BOTH
def test_whiten_is_the_loop(dtype, one_rank):
    x, mask = batch(1, dtype)
    values = picked(x, mask)
    mean, variance = statistics.fmean(values), statistics.pvariance(values)
    wanted = [(v - mean) / math.sqrt(variance + 1e-8) for v in values]
    whitened = whiten(x, mask, all_sum=one_rank)
    assert whitened.dtype == dtype
    assert picked(whitened, mask) == pytest.approx(wanted, rel=1e-6 if dtype == torch.float32 else 1e-12, abs=1e-7)
    assert (whitened[~mask] == 0).all()


def test_whiten_of_constant_values_is_zero(one_rank):
    mask = torch.ones(3, 2, dtype=torch.bool)
    assert (whiten(torch.full((3, 2), 5.0), mask, all_sum=one_rank) == 0).all()


@pytest.mark.parametrize("cut", [[7], [3, 4], [1, 0, 6], [2, 2, 2, 1]])
def test_whiten_is_the_same_for_any_cut_into_ranks(cut, one_rank, on_ranks):
    x, mask = batch(2, torch.float64)
    whole = whiten(x, mask, all_sum=one_rank)
    pieces = list(zip(x.split(cut), mask.split(cut), strict=True))
    parts = on_ranks(lambda piece, all_sum: whiten(*piece, all_sum=all_sum), pieces)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-13, atol=1e-13)


def test_whitening_each_rank_by_itself_would_differ(one_rank):
    """What `all_sum` is for: the cut test above can fail."""
    x, mask = batch(2, torch.float64)
    alone = torch.cat([whiten(*piece, all_sum=one_rank) for piece in zip(x.split(3), mask.split(3), strict=True)])
    assert (alone - whiten(x, mask, all_sum=one_rank)).abs().max() > 0.1


@BOTH
def test_score_moments_over_batches_and_ranks_are_those_of_all_scores(dtype, on_ranks):
    rng = random.Random(3)
    moments, seen = ScoreMoments(), []
    for sizes in ([4, 0, 3], [1], [5, 5], [2, 1]):
        pieces = [torch.tensor([rng.gauss(1e3, 2) for _ in range(size)], dtype=dtype) for size in sizes]
        seen += torch.cat(pieces).double().tolist()
        results = on_ranks(lambda piece, all_sum, m=moments: m.merge(piece, all_sum=all_sum), pieces)
        assert all(result == results[0] for result in results)
        moments = results[0]
    assert moments.count == len(seen) == 21
    assert moments.mean == pytest.approx(statistics.fmean(seen), rel=1e-14)
    assert moments.std == pytest.approx(statistics.pstdev(seen), rel=1e-11)
    scores = torch.tensor(seen[:4], dtype=dtype)
    wanted = [(s - statistics.fmean(seen)) / statistics.pstdev(seen) for s in seen[:4]]
    normalized = moments.normalize(scores, clip=0)
    assert normalized.dtype == dtype
    assert normalized.tolist() == pytest.approx(wanted, rel=1e-6, abs=1e-7)
    assert moments.normalize(scores, clip=0.5).tolist() == pytest.approx([max(-0.5, min(0.5, w)) for w in wanted])


def test_score_moments_survive_json_bit_for_bit(one_rank):
    moments = ScoreMoments().merge(torch.randn(9, generator=torch.Generator().manual_seed(4)), all_sum=one_rank)
    assert ScoreMoments(**json.loads(json.dumps(asdict(moments)))) == moments


def test_few_or_equal_scores_stay_finite(one_rank):
    assert ScoreMoments().normalize(torch.tensor([3.0]), clip=0).tolist() == [3.0]
    one = ScoreMoments().merge(torch.tensor([3.0]), all_sum=one_rank)
    assert (one.std, one.normalize(torch.tensor([3.0, 4.0]), clip=0).tolist()) == (1.0, [0.0, 1.0])
    equal = ScoreMoments().merge(torch.full((4,), 3.0), all_sum=one_rank)
    assert equal.normalize(torch.full((4,), 3.0), clip=0.8).tolist() == [0, 0, 0, 0]
