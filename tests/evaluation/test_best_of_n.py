"""The best of n by enumeration of all draws, its limits, and a price known by hand."""

import itertools
import math
from collections.abc import Sequence
from statistics import fmean

import numpy as np
import pytest

from megatron_gil.evaluation.best_of_n import Candidates, kl_of_best_of, kl_price, trusted_of_best


def enumerated(scores: Sequence[float], trusted: Sequence[float], n: int) -> float:
    """The mean over all subsets of n; of equally high scores, over each of them."""
    found = []
    for subset in itertools.combinations(range(len(scores)), n):
        top = max(scores[i] for i in subset)
        found.append(fmean(trusted[i] for i in subset if scores[i] == top))
    return fmean(found)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_the_best_of_n_is_that_of_all_subsets(n: int) -> None:
    rng = np.random.default_rng(n)
    scores, trusted = rng.permutation(6).astype(float).tolist(), rng.normal(size=6).tolist()
    assert trusted_of_best(scores, trusted, n) == pytest.approx(enumerated(scores, trusted, n))


def test_equal_scores_share_their_place() -> None:
    """Exactly where all or none are equal; of six with ties, within subsets the shares differ, the mean does not."""
    assert trusted_of_best([1.0] * 4, [0.0, 1.0, 2.0, 5.0], 3) == pytest.approx(2.0)
    scores, trusted = [0.0, 2.0, 2.0, 1.0, 2.0, 0.0], [3.0, 1.0, 4.0, 1.0, 5.0, 9.0]
    assert trusted_of_best(scores, trusted, 2) == pytest.approx(enumerated(scores, trusted, 2))


def test_the_kl_of_one_is_none_and_of_two_that_of_the_larger_of_two() -> None:
    assert kl_of_best_of(1) == 0
    uniform = (np.arange(20_000) + 0.5) / 20_000  # the larger of two has the density 2u
    assert kl_of_best_of(2) == pytest.approx(float(np.mean(2 * uniform * np.log(2 * uniform))), abs=1e-3)
    assert kl_of_best_of(16) == pytest.approx(math.log(16) - 15 / 16)


def hacked(count: int, rng: np.random.Generator) -> Candidates:
    """The reward is right up to the middle and wrong above."""
    scores = rng.permutation(count) / count
    return Candidates(group="easy", scores=scores.tolist(), trusted=(-np.abs(scores - 0.5)).tolist())


def right(count: int, rng: np.random.Generator) -> Candidates:
    scores = rng.permutation(count) / count
    return Candidates(group="hard", scores=scores.tolist(), trusted=scores.tolist())


def test_a_price_is_what_the_groups_lose_by_one_n() -> None:
    rng = np.random.default_rng(0)
    prompts = [make(8, rng) for make in (hacked, right) for _ in range(30)]
    found = kl_price(prompts, draws=200)
    easy, hard = found.groups["easy"], found.groups["hard"]
    assert hard.best_n == hard.best_n_low == hard.best_n_high == 8
    curve = [trusted_of_best(prompts[0].scores, prompts[0].trusted, n) for n in range(1, 9)]
    assert [e.value for e in easy.curve] == pytest.approx(curve)  # all prompts of a group are alike here
    assert easy.best_n == 1 + int(np.argmax(curve)) < 8
    other = [trusted_of_best(prompts[-1].scores, prompts[-1].trusted, n) for n in range(1, 9)]
    shared = max((a + b) / 2 for a, b in zip(curve, other, strict=True))
    assert found.price.value == pytest.approx((max(curve) + max(other)) / 2 - shared)
    assert found.price.low <= found.price.value <= found.price.high
    assert hard.best_kl == kl_of_best_of(8)


def test_groups_that_are_alike_have_no_price() -> None:
    rng = np.random.default_rng(1)
    prompts = [Candidates(group=g, scores=c.scores, trusted=c.trusted) for g in "ab" for c in [right(6, rng)]]
    assert kl_price(prompts * 10, draws=100).price.value == 0


def test_the_curve_ends_with_the_prompt_that_has_the_fewest_responses() -> None:
    rng = np.random.default_rng(2)
    assert len(kl_price([right(9, rng), right(4, rng)], draws=50).groups["hard"].curve) == 4


def test_a_group_of_one_prompt_has_no_interval() -> None:
    rng = np.random.default_rng(3)
    found = kl_price([hacked(4, rng), right(4, rng), right(4, rng)], draws=50)
    assert math.isnan(found.groups["easy"].curve[0].low)
    assert math.isfinite(found.price.value)
