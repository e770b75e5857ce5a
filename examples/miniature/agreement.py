"""How far the inferred groups agree with labels known from elsewhere."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import comb, exp, lgamma, log

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

Labels = Sequence[Hashable]


def adjusted_mutual_information(a: Labels, b: Labels) -> float:
    """(MI - E[MI]) / (mean(H(a), H(b)) - E[MI]), the expectation over all permutations of the labels (Vinh, Epps and
    Bailey, JMLR 2010): 1 for the same partition, about 0 for unrelated ones, 1 where both hold one label only."""
    counts = _contingency(a, b)
    rows, columns = counts.sum(1), counts.sum(0)
    if len(rows) == len(columns) == 1:
        return 1.0
    expected = _expected_mutual_information(rows, columns)
    ceiling = (_entropy(rows) + _entropy(columns)) / 2
    # both partitions of singletons: every permutation has all the information there is
    return 1.0 if abs(ceiling - expected) < 1e-12 else (_mutual_information(counts) - expected) / (ceiling - expected)


def adjusted_rand_index(a: Labels, b: Labels) -> float:
    """(pairs together in both - expected) / (mean of pairs together in each - expected) (Hubert and Arabie 1985)."""
    counts = _contingency(a, b)
    together = sum(comb(int(n), 2) for n in counts.ravel())
    in_a, in_b = (sum(comb(int(n), 2) for n in margin) for margin in (counts.sum(1), counts.sum(0)))
    expected = in_a * in_b / max(comb(int(counts.sum()), 2), 1)
    ceiling = (in_a + in_b) / 2
    return 1.0 if ceiling == expected else (together - expected) / (ceiling - expected)


def roc_auc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """P(score of a random positive > score of a random negative), ties counting half; nan with one class only."""
    values, is_positive = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    num_positive, num_negative = int(is_positive.sum()), int((~is_positive).sum())
    if not num_positive or not num_negative:
        return float("nan")
    _, inverse, sizes = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(sizes) - (sizes - 1) / 2)[inverse]  # from 1, ties share their mean
    wins = ranks[is_positive].sum() - num_positive * (num_positive + 1) / 2
    return float(wins / (num_positive * num_negative))


def _contingency(a: Labels, b: Labels) -> Int[ndarray, "a b"]:
    assert len(a) == len(b), (len(a), len(b))
    rows, columns = ({label: i for i, label in enumerate(dict.fromkeys(labels))} for labels in (a, b))
    counts = np.zeros((len(rows), len(columns)), dtype=np.int64)
    for label_a, label_b in zip(a, b, strict=True):
        counts[rows[label_a], columns[label_b]] += 1
    return counts


def _entropy(sizes: Int[ndarray, " labels"]) -> float:
    shares = sizes / sizes.sum()
    return float(-(shares * np.log(shares)).sum())


def _mutual_information(counts: Int[ndarray, "a b"]) -> float:
    joint = counts / counts.sum()
    independent: Float[ndarray, "a b"] = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    filled = joint > 0
    return float((joint[filled] * np.log(joint[filled] / independent[filled])).sum())


def _expected_mutual_information(rows: Int[ndarray, " a"], columns: Int[ndarray, " b"]) -> float:
    """Mean of the mutual information when one labelling is shuffled: a cell's count is hypergeometric."""
    total = int(rows.sum())
    expected = 0.0
    for size_a in map(int, rows):
        for size_b in map(int, columns):
            for n in range(max(1, size_a + size_b - total), min(size_a, size_b) + 1):
                log_probability = (
                    _log_comb(size_b, n) + _log_comb(total - size_b, size_a - n) - _log_comb(total, size_a)
                )
                expected += exp(log_probability) * n / total * log(total * n / (size_a * size_b))
    return expected


def _log_comb(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)
