"""Agreement of partitions against the definitions: averages over all permutations, loops over all pairs."""

import itertools
import math
import random
from collections import Counter

import pytest
from agreement import adjusted_mutual_information, adjusted_rand_index, roc_auc

CASES = [
    ([0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 1, 0]),
    ([0, 0, 0, 1, 1, 1, 1], [1, 0, 0, 1, 1, 0, 1]),
    ([0, 1, 2, 0, 1, 2, 0], [0, 1, 1, 0, 1, 1, 0]),
    (["a", "a", "b", "b", "b", "a", "a"], [0, 1, 2, 3, 0, 1, 0]),
]


def _entropy(labels: list) -> float:
    return -sum(n / len(labels) * math.log(n / len(labels)) for n in Counter(labels).values())


def _information(a: list, b: list) -> float:
    return _entropy(a) + _entropy(b) - _entropy(list(zip(a, b, strict=True)))


def _rand(a: list, b: list) -> int:
    pairs = itertools.combinations(range(len(a)), 2)
    return sum(a[i] == a[j] and b[i] == b[j] for i, j in pairs)


def _over_permutations(statistic, a: list, b: list) -> float:
    shuffles = list(itertools.permutations(b))
    return sum(statistic(a, list(shuffled)) for shuffled in shuffles) / len(shuffles)


@pytest.mark.parametrize(("a", "b"), CASES)
def test_mutual_information_is_adjusted_by_its_mean_over_all_permutations(a: list, b: list) -> None:
    expected = _over_permutations(_information, a, b)
    ceiling = (_entropy(a) + _entropy(b)) / 2
    assert adjusted_mutual_information(a, b) == pytest.approx((_information(a, b) - expected) / (ceiling - expected))


@pytest.mark.parametrize(("a", "b"), CASES)
def test_rand_index_is_adjusted_by_its_mean_over_all_permutations(a: list, b: list) -> None:
    expected = _over_permutations(_rand, a, b)
    ceiling = (_rand(a, a) + _rand(b, b)) / 2
    assert adjusted_rand_index(a, b) == pytest.approx((_rand(a, b) - expected) / (ceiling - expected))


@pytest.mark.parametrize("agreement", [adjusted_mutual_information, adjusted_rand_index])
def test_extremes(agreement) -> None:
    a = [0, 0, 1, 1, 2, 2]
    assert agreement(a, ["x", "x", "y", "y", "z", "z"]) == pytest.approx(1)  # names do not matter
    assert agreement([0] * 6, [1] * 6) == 1
    assert agreement([0] * 6, a) == pytest.approx(0)
    rng = random.Random(1)
    unrelated = [
        agreement([rng.randrange(2) for _ in range(300)], [rng.randrange(4) for _ in range(300)]) for _ in "12345"
    ]
    assert abs(sum(unrelated) / 5) < 0.02


def test_auc_counts_pairs() -> None:
    rng = random.Random(2)
    for _ in range(20):
        scores = [rng.randrange(6) / 5 for _ in range(40)]  # many ties
        positive = [rng.random() < 0.3 for _ in scores]
        if not 0 < sum(positive) < len(positive):
            continue
        pairs = [
            (p, n)
            for p, is_p in zip(scores, positive, strict=True)
            if is_p
            for n, q in zip(scores, positive, strict=True)
            if not q
        ]
        by_hand = sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs)
        assert roc_auc(scores, positive) == pytest.approx(by_hand)


def test_auc_of_one_class_is_nan() -> None:
    assert math.isnan(roc_auc([0.1, 0.2], [True, True]))
