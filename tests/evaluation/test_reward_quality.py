"""Quality of a reward model against slow definitions, on data whose truth is known, and where there is next to none."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict
from statistics import fmean, median
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from megatron_gil.config import ConfigError
from megatron_gil.evaluation.calibration import best_temperature, bin_ids, error_if_calibrated
from megatron_gil.evaluation.cluster_bootstrap import expanded_interval, number_clusters, resampled_sums
from megatron_gil.evaluation.quality_tables import as_markdown, quality_table, sentences
from megatron_gil.evaluation.report.figures import to_svg
from megatron_gil.evaluation.report.quality_figures import quality_picture
from megatron_gil.evaluation.reward_quality import UNLABELLED, Quality, divisions, quality, reward_quality
from megatron_gil.evaluation.scored_pairs import LARGEST_SCORE, ScoredPair
from megatron_gil.evaluation.statistics import interval, wilson
from megatron_gil.evaluation.tables import finite


def make_pair(
    margin: float, place: int = 0, *, prompt: str | None = None, lengths: tuple[int, int] = (3, 2)
) -> ScoredPair:
    return ScoredPair(
        prompt=f"prompt {place}" if prompt is None else prompt,
        chosen="c" * lengths[0],
        rejected="r" * lengths[1],
        score_chosen=margin,
        score_rejected=0.0,
        source="held-out",
    )


def make_pairs(count: int, *, seed: int = 0, scale: float = 1.0, per_prompt: int = 1) -> list[ScoredPair]:
    """The true log odds are normal, the choice follows them, and the margin is `scale` times them."""
    rng, pairs = random.Random(seed), []
    for i in range(count):
        log_odds = rng.gauss(0, 1.5)
        margin = log_odds if rng.random() < 1 / (1 + math.exp(-log_odds)) else -log_odds
        lengths = rng.randint(1, 60), rng.randint(1, 60)
        pairs.append(make_pair(scale * margin, prompt=f"prompt {i // per_prompt}", lengths=lengths))
    return pairs


def slow_error(margins: list[float], num_bins: int) -> float:
    """Expected calibration error, where as many pairs go into each bin."""
    ordered, size, total = sorted(margins, key=abs), len(margins) // num_bins, 0.0
    for start in range(0, len(margins), size):
        part = ordered[start : start + size]
        sure = fmean(1 / (1 + math.exp(-abs(m))) for m in part)
        right = fmean(1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in part)
        total += len(part) / len(margins) * abs(right - sure)
    return total


def slow_temperature(margins: list[float]) -> float:
    def loss(log_temperature: float) -> float:
        return float(np.logaddexp(0, -np.array(margins) / math.exp(log_temperature)).mean())

    found = scipy.optimize.minimize_scalar(loss, bounds=(-6, 6), method="bounded", options={"xatol": 1e-9})
    return math.exp(found.x)


def test_equals_slow_definitions() -> None:
    pairs = make_pairs(200, seed=3, scale=1.7)
    margins = [pair.margin for pair in pairs]
    found = quality(pairs)
    assert found.accuracy.value == fmean(pair.score_chosen > pair.score_rejected for pair in pairs)
    assert found.margin.value == pytest.approx(fmean(margins))
    assert found.margin_median == pytest.approx(median(margins))
    assert found.log_loss.value == pytest.approx(fmean(math.log(1 + math.exp(-m)) for m in margins))
    assert found.calibration_error.value == pytest.approx(slow_error(margins, num_bins=10))
    temperature = found.temperature
    assert temperature.value.value == pytest.approx(slow_temperature(margins), rel=1e-5)  # its loss is flat there
    cooled = [m / temperature.value.value for m in margins]
    assert temperature.log_loss == pytest.approx(fmean(math.log(1 + math.exp(-m)) for m in cooled))
    assert temperature.calibration_error == pytest.approx(slow_error(cooled, num_bins=10))
    assert [b.num_pairs for b in found.bins] == [20] * 10
    assert sum(b.accuracy.value * b.num_pairs for b in found.bins) == pytest.approx(found.accuracy.value * 200)


def test_length_effect_equals_slow_definitions() -> None:
    pairs = [*make_pairs(150, seed=4), make_pair(0.0, 9, lengths=(5, 3)), make_pair(1.0, 9, lengths=(4, 4))]
    unequal = [pair for pair in pairs if len(pair.chosen) != len(pair.rejected)]
    higher = []
    for pair in unequal:
        longer_first = len(pair.chosen) > len(pair.rejected)
        higher.append(0.5 if pair.margin == 0 else float((pair.margin > 0) == longer_first))
    found = quality(pairs).length
    assert found.longer_scores_higher.value == pytest.approx(fmean(higher))
    assert found.longer_is_chosen.value == pytest.approx(fmean(len(p.chosen) > len(p.rejected) for p in unequal))
    margin = np.array([pair.margin for pair in pairs])
    longer_by = np.array([len(pair.chosen) - len(pair.rejected) for pair in pairs])
    both: Any = scipy.stats.spearmanr(np.r_[margin, -margin], np.r_[longer_by, -longer_by])
    assert found.correlation.value == pytest.approx(both.statistic)


def test_wilson_equals_scipy() -> None:
    for right, trials in ((0, 4), (3, 10), (50, 50), (1, 1)):
        expected = scipy.stats.binomtest(right, trials).proportion_ci(method="wilson")
        found = wilson(right / trials, trials)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_calibrated_margins_look_calibrated_and_scaled_ones_do_not() -> None:
    calibrated, scaled = quality(make_pairs(4000, seed=1)), quality(make_pairs(4000, seed=1, scale=3))
    assert calibrated.calibration_error.value < calibrated.calibrated_high
    low, value, high = (getattr(calibrated.temperature.value, name) for name in ("low", "value", "high"))
    assert low < 1 < high
    assert value == pytest.approx(1, abs=0.1)
    assert scaled.temperature.value.value == pytest.approx(3 * value)
    assert scaled.temperature.value.low > 1
    assert scaled.calibration_error.low > scaled.calibrated_high
    assert scaled.temperature.calibration_error == pytest.approx(calibrated.calibration_error.value, abs=0.01)
    assert (scaled.temperature.log_loss or math.inf) < scaled.log_loss.value
    assert scaled.accuracy == calibrated.accuracy


def test_error_of_a_calibrated_model_is_above_the_limit_in_one_case_of_twenty() -> None:
    above = 0
    for seed in range(100):
        margins = np.array([pair.margin for pair in make_pairs(300, seed=seed)])
        _, high = error_if_calibrated(margins, bin_ids(margins), draws=400)
        above += slow_error(margins.tolist(), num_bins=10) > high
    assert 1 <= above <= 12  # 5 expected; a binomial of 100 trials lies in here in 99.4 % of cases


def test_error_if_calibrated_equals_a_slow_simulation() -> None:
    margins = [pair.margin for pair in make_pairs(100, seed=8)]
    rng, found = random.Random(2), []
    for _ in range(1000):
        drawn = [abs(m) if rng.random() < 1 / (1 + math.exp(-abs(m))) else -abs(m) for m in margins]
        found.append(slow_error(drawn, num_bins=5))
    mean, high = error_if_calibrated(np.array(margins), bin_ids(np.array(margins)))
    assert mean == pytest.approx(fmean(found), rel=0.05)  # 1000 draws of a spread of a third: 1.5 % on either side
    assert high == pytest.approx(np.quantile(found, 0.95), rel=0.1)


def test_resampled_sums_equal_a_plain_loop() -> None:
    prompts = ["a", "b", "a", "c", "c", "c"]
    values = np.array([[1.0, 10], [2, 20], [3, 30], [4, 40], [5, 50], [6, 60]])
    found = resampled_sums(number_clusters(prompts), {"one": values[:, 0], "two": values}, draws=7, seed=5)
    drawn = np.random.default_rng(5).integers(3, size=(7, 3))
    for i, numbers in enumerate(drawn):
        rows = [row for number in numbers for row in range(6) if prompts[row] == "abc"[number]]
        assert found["one"][i] == sum(values[row, 0] for row in rows)
        assert found["two"][i].tolist() == [sum(values[row, k] for row in rows) for k in range(2)]


def test_intervals_cover_the_truth_where_pairs_of_a_prompt_are_alike() -> None:
    """15 prompts of 6 pairs: an interval that took pairs for independent would be too narrow."""
    rng, covered, covered_by_rows = np.random.default_rng(0), 0, 0
    prompts = np.repeat(np.arange(15), 6)
    for seed in range(300):
        values = rng.normal(size=15)[prompts] + 0.3 * rng.normal(size=90)
        sums = resampled_sums(prompts, {"value": values}, draws=400, seed=seed)["value"] / 90
        found = expanded_interval(float(values.mean()), sums, 15)
        covered += found.low <= 0 <= found.high
        rows = resampled_sums(np.arange(90), {"value": values}, draws=400, seed=seed)["value"] / 90
        naive = interval(float(values.mean()), rows)
        covered_by_rows += naive.low <= 0 <= naive.high
    assert covered / 300 > 0.91  # 0.95 less three standard errors
    assert covered_by_rows / 300 < 0.75


def test_temperature_interval_equals_one_with_an_optimum_for_every_draw() -> None:
    """Ours takes one step of Newton's method for each draw."""
    pairs = make_pairs(1000, seed=6, scale=2, per_prompt=2)
    margins = np.array([pair.margin for pair in pairs])
    rng, optima = random.Random(1), []
    for _ in range(400):
        prompts = [rng.randrange(500) for _ in range(500)]
        optima.append(best_temperature(np.concatenate([margins[2 * p : 2 * p + 2] for p in prompts])))
    found = quality(pairs).temperature.value
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(optima, [0.025, 0.975])), rel=0.03)


def test_more_pairs_of_one_prompt_make_no_narrower_interval() -> None:
    one = quality(make_pairs(100, seed=2))
    tenfold = quality([pair for pair in make_pairs(100, seed=2) for _ in range(10)])
    assert tenfold.accuracy == one.accuracy
    assert (tenfold.num_pairs, tenfold.num_prompts) == (1000, 100)


# --- where there is next to nothing


def check_written(pairs: list[ScoredPair]) -> Quality:
    """All that is said of them, whatever the numbers are."""
    found = reward_quality(pairs)
    json.dumps(finite(asdict(found)), allow_nan=False)
    text = as_markdown(found, "picture.svg")
    assert "nan" not in text
    assert all(sentences(found))
    assert len(quality_table(found).rows) >= 3
    to_svg(quality_picture(found.overall.bins, {"all": [pair.margin for pair in pairs]}, {}))
    return found.overall


def test_one_pair() -> None:
    found = check_written([make_pair(2.0)])
    assert found.accuracy.value == 1
    assert found.accuracy.low == pytest.approx(wilson(1.0, 1).low)
    assert found.accuracy.low < 0.25
    assert found.temperature.value.value == 0
    assert math.isnan(found.margin.low)
    assert len(found.bins) == 1


def test_all_ties() -> None:
    found = check_written([make_pair(0.0, i) for i in range(50)])
    assert (found.accuracy.value, found.num_ties, found.calibration_error.value) == (0.5, 50, 0)
    assert found.log_loss.value == pytest.approx(math.log(2))
    assert math.isnan(found.temperature.value.value)
    assert math.isnan(found.length.correlation.value)
    assert found.length.longer_scores_higher.value == 0.5


def test_all_wrong_and_all_right() -> None:
    wrong, right = (check_written([make_pair(sign * (1 + i), i) for i in range(60)]) for sign in (-1, 1))
    assert (wrong.accuracy.value, right.accuracy.value) == (0, 1)
    assert wrong.accuracy.high > 0.02
    assert right.accuracy.low == pytest.approx(1 - wrong.accuracy.high)
    assert wrong.temperature.value.value == math.inf
    assert right.temperature.value.value == 0


@pytest.mark.parametrize("size", [LARGEST_SCORE, 1e-300])
def test_margins_of_any_size(size: float) -> None:
    rng = random.Random(3)
    margins = [size * rng.gauss(0.5, 0.3) for _ in range(80)]
    pairs = [make_pair(max(-LARGEST_SCORE, min(LARGEST_SCORE, m)), i) for i, m in enumerate(margins)]
    assert min(margins) < 0
    found = check_written(pairs)
    expected = best_temperature(np.array([pair.margin / size for pair in pairs])) * size
    assert found.temperature.value.value == pytest.approx(expected)
    assert found.accuracy.value == fmean(m > 0 for m in margins)


def test_identical_responses_are_counted_and_left_out() -> None:
    same = ScoredPair(prompt="p", chosen=" a", rejected="a\n", score_chosen=1.0, score_rejected=0.0, source="file")
    found = reward_quality([same, make_pair(1.0), make_pair(-1.0)])
    assert (found.num_identical, found.overall.num_pairs, found.overall.accuracy.value) == (1, 2, 0.5)
    assert "1 rows of two identical responses are left out" in sentences(found)[0]
    with pytest.raises(ConfigError, match="file: no pair of two different responses"):
        reward_quality([same])


# --- slices


def test_divisions() -> None:
    def pair(source: str, group: str | None, lengths: tuple[int, int]) -> ScoredPair:
        base = make_pair(1.0, lengths=lengths)
        return ScoredPair(**{**asdict(base), "source": source, "group": group})

    pairs = [
        pair("one", None, (1, 3)),
        pair("one", "hard", (4, 6)),
        pair("one", "easy", (95, 100)),
        pair("two", "hard", (100, 95)),
        pair("two", "hard", (6, 4)),
        pair("two", None, (3, 1)),
    ]
    found = {by: {name: len(part) for name, part in parts.items()} for by, parts in divisions(pairs).items()}
    assert found["file"] == {"one": 3, "two": 3}
    assert list(found["group"].items()) == [("hard", 3), ("easy", 1), (UNLABELLED, 2)]
    expected = {"under half": 1, "shorter": 1, "within 10 %": 2, "longer": 1, "over double": 1}
    assert found["chosen length"] == expected
    assert found["characters"] == {"0 to 11": 2, "12 to 14": 2, "15 and more": 2}
    parts = divisions(pairs[:2])
    assert "file" not in parts
    assert "group" not in divisions([pairs[0]])


def test_slices_have_the_numbers_of_their_pairs_alone() -> None:
    easy, hard = (
        [ScoredPair(**{**asdict(pair), "group": name}) for pair in make_pairs(60, seed=seed, scale=scale)]
        for name, seed, scale in (("easy", 1, 1.0), ("hard", 2, 4.0))
    )
    mixed = [pair for both in zip(easy, hard, strict=True) for pair in both]
    found = reward_quality(mixed)
    assert found.slices["group"] == {"easy": quality(easy), "hard": quality(hard)}
    assert found.overall == quality(mixed)
