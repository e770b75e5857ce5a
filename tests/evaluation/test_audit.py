"""The measures of an audit against plain loops, its advice, and its page."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from megatron_gil.evaluation.audit.advice import ONE_KL_FROM, Agreement, advise
from megatron_gil.evaluation.audit.correlation import correlate
from megatron_gil.evaluation.audit.measure import audit_rows, prompt_kappa
from megatron_gil.evaluation.audit.page import audit_page
from megatron_gil.evaluation.audit.rows import AuditedPair, AuditedRows, SampledResponse, TrustedRow
from megatron_gil.evaluation.audit.tables import groups_table
from megatron_gil.evaluation.audit.words import typical_words
from megatron_gil.evaluation.scored_pairs import ScoredPair
from megatron_gil.evaluation.statistics import Estimate
from megatron_gil.evaluation.tables import finite


def _agreement(value: float, low: float, high: float, count: int = 100) -> Agreement:
    return Agreement(value=Estimate(value=value, low=low, high=high), num_rows=count)


def _responses(count: int = 60) -> list[SampledResponse]:
    """Odd ones are surely in group 1, score lower and say other words; every fifth is a canned reply."""
    rng, found = np.random.default_rng(0), []
    for i in range(count):
        odd = i % 2
        text = "<b>no</b> idea" if i % 5 == 0 else f"{'maybe' if odd else 'yes'} the {i}"
        p = 0.1 + 0.2 * rng.random()
        found.append(
            SampledResponse(
                prompt=f"prompt {i}",
                response=text,
                score=float(rng.normal(-1.0 if odd else 1.0)),
                probs=(p, 1 - p) if odd else (1 - p, p),
                num_tokens=3 + i % 7,
                label="hard" if odd else "easy",
            )
        )
    return found


def _pair(i: int, margin: float, group: str) -> AuditedPair:
    texts = {"prompt": f"p{i}", "chosen": f"good {i}", "rejected": "bad"}
    pair = ScoredPair(**texts, score_chosen=margin, score_rejected=0.0, group=group, source="audit.pairs")
    return AuditedPair(pair=pair, views=(group, group))


def _rows(**changes: Any) -> AuditedRows:
    pairs = [_pair(i, (-1) ** (i % 3 == 0) * 1.0, f"group {i % 2}") for i in range(120)]
    trusted = [
        TrustedRow(prompt=f"p{i}", response="r", score=i + 7.0 * (i % 3), trusted=float(i), group=f"group {i % 2}")
        for i in range(60)
    ]
    values: dict[str, Any] = {
        "groups": ("group 0", "group 1"),
        "pairs": tuple(pairs),
        "trusted": tuple(trusted),
        "responses": tuple(_responses()),
    }
    return AuditedRows(**{**values, **changes})


def test_correlations_are_scipys() -> None:
    rng = np.random.default_rng(1)
    x = rng.integers(0, 6, size=50).astype(float)  # with ties
    y = x + rng.normal(size=50)
    found = correlate(x.tolist(), y.tolist(), [f"p{i}" for i in range(50)], draws=20)
    assert found.spearman.value == pytest.approx(spearmanr(x, y)[0], abs=1e-12)
    assert found.pearson.value == pytest.approx(pearsonr(x, y)[0], abs=1e-12)
    assert (found.num_rows, found.num_prompts) == (50, 50)


def test_intervals_are_those_of_a_plain_bootstrap_over_prompts() -> None:
    """Ranks taken anew in each draw, whole prompts drawn; the ends agree to the noise of 4,000 draws."""
    rng = np.random.default_rng(2)
    prompts = [f"p{i // 3}" for i in range(90)]
    level = np.repeat(rng.normal(size=30), 3)
    x, y = level + 0.3 * rng.normal(size=90), level + rng.normal(size=90)
    found = correlate(x.tolist(), y.tolist(), prompts, draws=4000)
    draws = []
    for _ in range(1500):
        index = np.concatenate([np.arange(3 * p, 3 * p + 3) for p in rng.integers(30, size=30)])
        draws.append(spearmanr(x[index], y[index])[0])
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found.spearman.low == pytest.approx(low, abs=0.05)
    assert found.spearman.high == pytest.approx(high, abs=0.05)


def test_a_number_that_does_not_vary_has_no_correlation() -> None:
    found = correlate([1e9 + 0.1] * 5, [1.0, 2.0, 3.0, 4.0, 5.0], list("abcde"))
    assert math.isnan(found.spearman.value)
    assert math.isnan(found.pearson.value)
    one = correlate([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], ["same", "same", "same"])
    assert one.spearman.value == pytest.approx(1.0)
    assert math.isnan(one.spearman.low)
    two = correlate([1.0, 2.0], [1.0, 2.0], ["a", "b"])  # always 1 or -1, in every draw
    assert math.isnan(two.spearman.value)
    assert math.isnan(two.pearson.high)


def test_typical_words() -> None:
    everything = ["yes the cat", "yes the dog", "no The bird"]
    found = typical_words(everything[:2], everything, 2)
    counts = Counter(" ".join(everything).lower().split())
    assert [(w.word, w.here, w.everywhere) for w in found] == [
        ("yes", 2 / 6, counts["yes"] / 9),
        ("cat", 1 / 6, counts["cat"] / 9),
    ]
    assert typical_words([], everything, 3) == []


def test_kappa_of_two_readings() -> None:
    """Scott's pi in a plain loop."""
    views = [("p", ("a", "a"))] * 6 + [("q", ("b", "b"))] * 3 + [("r", ("a", "b"))]
    sides = [side for _, pair in views for side in pair]
    expected = sum((sides.count(name) / len(sides)) ** 2 for name in "ab")
    found = prompt_kappa(views)
    assert found is not None
    assert found.value == pytest.approx((0.9 - expected) / (1 - expected))
    assert prompt_kappa([("p", ()), ("q", ("a",))]) is None
    alone = prompt_kappa([("p", ("a", "a"))])
    assert alone is not None
    assert math.isnan(alone.value)


def test_the_numbers_of_a_group() -> None:
    rows = _rows()
    found = audit_rows(rows, min_group_mass=0.02)
    assert (found.high, found.low) == ("group 0", "group 1")
    for index, group in enumerate(found.groups):
        here = [row for row in rows.responses if row.probs[index] > 0.5]
        assert group.mass == pytest.approx(sum(row.probs[index] for row in rows.responses) / 60)
        assert group.num_responses == len(here) == 30
        assert group.score_mean == pytest.approx(sum(row.score for row in here) / 30)
        assert group.tokens_mean == pytest.approx(sum(row.num_tokens for row in here) / 30)
        assert group.duplicate_fraction == sum(row.response == "<b>no</b> idea" for row in here) / 30
        assert group.labels == {("easy", "hard")[index]: 30}
        assert group.words[0].word == ("yes", "maybe")[index]
        best = sorted((row.probs[index] for row in here), reverse=True)[:8]
        assert [row.probs[index] for row in group.surest] == best
        quality = found.quality_of(group.name)
        assert quality is not None
        assert quality.accuracy.value == pytest.approx(40 / 60)
    both = [row for row in rows.trusted if row.group == "group 1"]
    expected = spearmanr([row.score for row in both], [row.trusted for row in both])[0]
    assert found.trusted_by_group["group 1"].spearman.value == pytest.approx(expected)
    assert "Spearman's of 30 trusted rows" in found.advice.line
    backwards = audit_rows(_rows(pairs=rows.pairs[::-1]), min_group_mass=0.02).quality
    assert backwards is not None
    assert list(backwards.slices["group"]) == ["group 0", "group 1"]
    high = found.trusted_by_group["group 0"].spearman
    assert found.on_high is not None
    assert found.on_high.value == high
    assert f"agreement {high.value:.2f} [{high.low:.2f}, {high.high:.2f}]" in found.advice.line


def test_pairs_alone_do_not_decide() -> None:
    found = audit_rows(_rows(trusted=()), min_group_mass=0.02)
    assert found.trusted is None
    assert found.advice.settings == {}
    assert "No trusted row lies in the high group, and pairs do not tell" in found.advice.line
    assert "kappa" in groups_table(found).note
    found = audit_rows(_rows(pairs=(_pair(0, 1.0, "group 0"),), trusted=()), min_group_mass=0.02)
    assert "kappa" not in groups_table(found).note
    found = audit_rows(_rows(pairs=()), min_group_mass=0.02)
    assert found.quality is None
    assert found.quality_of("group 0") is None


def test_one_group_is_no_groups() -> None:
    found = audit_rows(_rows(), min_group_mass=0.6)
    assert found.low is None
    assert found.advice.settings == {"gil.balance_coef": 1.0}


def test_one_score_makes_no_groups() -> None:
    """As of a rule that no response fulfils yet: no group is high, low or both."""
    rows = _rows(responses=tuple(replace(row, score=0.1) for row in _responses()))
    found = audit_rows(rows, min_group_mass=0.02)
    assert found.low is None
    assert found.advice.settings == {}
    assert "All of the policy's responses have the same score" in found.advice.line
    assert "(low)" not in audit_page(found, rows, [], name="x")


@pytest.mark.parametrize(("value", "num_groups"), [(-0.5, 2), (ONE_KL_FROM - 0.01, 2), (ONE_KL_FROM, 1), (1.0, 1)])
def test_advice_by_the_agreement_in_the_high_group(value: float, num_groups: int) -> None:
    found = advise(_agreement(value, value, value))
    assert found.settings == {"gil.num_groups": num_groups}
    assert found.is_certain
    assert f"gil.num_groups={num_groups}" in found.line


def test_advice_says_where_rows_are_too_few() -> None:
    found = advise(_agreement(0.59, 0.3, 0.85))
    assert not found.is_certain
    assert "agreement 0.59 [0.30, 0.85], Spearman's of 100 trusted rows" in found.line
    assert found.line.endswith("the interval holds 0.69; about 9 times as many in the high group would.")
    assert "more than 20 times" in advise(_agreement(0.6899, 0.6, 0.8)).line
    assert "of one prompt" in advise(_agreement(0.5, math.nan, math.nan)).line
    for nothing in (None, _agreement(math.nan, math.nan, math.nan)):
        assert advise(nothing).settings == {}
    assert (
        "Scores or trusted numbers are too few or do not vary in the trusted rows of the high group"
        in advise(nothing).line
    )


def test_advice_waits_for_groups_of_prompts() -> None:
    high = _agreement(0.9, 0.8, 0.95)
    found = advise(high, Estimate(value=0.1, low=0.0, high=0.2))
    assert found.settings == {}
    assert "models.policy=PILOT models.ref_policy=SFT" in found.line
    none = advise(high, Estimate(value=-0.09, low=-0.2, high=0.0))
    assert "agree too little beyond chance (kappa -0.09 [-0.20, 0.00])" in none.line
    for kappa in (0.9, math.nan):
        assert advise(high, Estimate(value=kappa, low=kappa, high=kappa)).settings == {"gil.num_groups": 1}


def test_the_page_shows_all_and_escapes_texts() -> None:
    rows = _rows()
    found = audit_rows(rows, min_group_mass=0.02)
    training = [
        {
            **{f"group/mass_{i}": 0.5 for i in range(2)},
            **{f"reward/score_mean_group_{i}": 0.1 * i for i in range(2)},
            "group/return_variance": 0.1 * step,
            "group/information": 0.5,
        }
        for step in range(3)
    ]
    page = audit_page(found, rows, training, name="a<b")
    assert "<b>no</b>" not in page
    assert "&lt;b&gt;no&lt;/b&gt; idea" in page
    assert "Audit a&lt;b" in page
    assert "group 1 (low)" in page
    assert page.count("data:image/svg+xml") == 6
    assert "nan" not in json.dumps(finite(asdict(found))).lower()
    sparse = audit_rows(_rows(pairs=()), min_group_mass=0.02)
    assert audit_page(sparse, _rows(pairs=()), [], name="x").count("data:image/svg+xml") == 1
