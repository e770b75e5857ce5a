"""Win rates and the sign test against counting by hand."""

import math
from fractions import Fraction
from itertools import product

import pytest

from megatron_gil.config import ConfigError
from megatron_gil.evaluation.comparisons import pair_rows
from megatron_gil.evaluation.judge import ScoreJudge, opposite
from megatron_gil.evaluation.statistics import sign_test
from megatron_gil.evaluation.winrate import HEADER, judge_all, table_rows, win_rate
from tests.evaluation.judged import judged

LENGTH = ScoreJudge("length", lambda prompt, response: float(len(response)))


def _rows(*responses: str) -> list[dict[str, str]]:
    return [{"prompt": f"p{i}", "response": response} for i, response in enumerate(responses)]


def test_win_rate_counts_and_swaps() -> None:
    ours, theirs = _rows("aaa", "a", "aa", "aaaa"), _rows("a", "aa", "bb", "a")
    found = judge_all(LENGTH, pair_rows(ours, theirs, "files"))
    assert [j.outcome for j in found] == ["win", "lose", "tie", "win"]
    swapped = judge_all(LENGTH, pair_rows(theirs, ours, "files"))
    assert [j.outcome for j in swapped] == [opposite(v) for v in ("win", "lose", "tie", "win")]
    rate = win_rate(found)
    assert (rate.win.value, rate.tie.value, rate.lose.value, rate.margin.value) == (0.5, 0.25, 0.25, 0.25)
    assert rate.margin.low < 0.25 < rate.margin.high
    (row,) = table_rows({"them": rate})
    assert len(row) == len(HEADER)
    assert row[:5] == ("them", "4", "50.0", "25.0", "25.0")


def test_win_rate_interval_is_binomial() -> None:
    """60 wins in 100: 1.96 sqrt(0.6 * 0.4 / 100) = 0.096 to either side."""
    win = win_rate([judged("win" if i < 60 else "lose", f"p{i}") for i in range(100)]).win
    assert win.low == pytest.approx(0.6 - 0.096, abs=0.015)
    assert win.high == pytest.approx(0.6 + 0.096, abs=0.015)


def test_a_prompt_counts_once() -> None:
    """Nine wins on one prompt are one: with a loss on another it is even, and their spread is that of two prompts."""
    often = [judged("win", "repeated", ours=str(i)) for i in range(9)]
    rate = win_rate([*often, judged("lose", "once")])
    assert (rate.num_prompts, rate.win.value, rate.lose.value, rate.sign_test) == (2, 0.5, 0.5, 1.0)
    assert (rate.margin.low, rate.margin.high) == (-1.0, 1.0)
    split = win_rate([judged("win", "p"), judged("tie", "p", rater="second"), judged("lose", "q")])
    assert (split.win.value, split.tie.value, split.lose.value, split.margin.value) == (0.25, 0.25, 0.5, -0.25)


def test_what_was_not_judged_is_in_no_share() -> None:
    some = win_rate([judged("win", "a"), judged("refused", "b"), judged("unanswered", "c"), judged("refused", "d")])
    assert (some.num_prompts, some.win.value, some.refused, some.unanswered) == (1, 1.0, 2, 1)
    none = win_rate([judged("refused")])
    assert none.num_prompts == 0
    assert math.isnan(none.margin.value)
    assert none.sign_test == 1.0
    assert table_rows({"o": none})[0][1:6] == ("0", "-", "-", "-", "-")


def test_sign_test_counts_every_outcome() -> None:
    """Against all 2^n outcomes of n fair coins."""
    for n in range(1, 11):
        heads = [sum(coins) for coins in product((0, 1), repeat=n)]
        for wins in range(n + 1):
            extreme = sum(abs(h - n / 2) >= abs(wins - n / 2) for h in heads)
            assert sign_test(wins, n - wins) == pytest.approx(min(1.0, extreme / 2**n), rel=1e-12)
    assert sign_test(0, 0) == 1.0


@pytest.mark.parametrize(("wins", "losses"), [(520, 480), (1200, 1000), (5000, 5000), (6000, 4000)])
def test_sign_test_of_many_prompts(wins: int, losses: int) -> None:
    """Exact fractions; 2^10000 fits no float."""
    n = wins + losses
    tail = sum(Fraction(math.comb(n, k), 2**n) for k in range(min(wins, losses) + 1))
    assert sign_test(wins, losses) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-12)
    assert sign_test(losses, wins) == sign_test(wins, losses)


def test_responses_to_other_prompts_are_refused() -> None:
    other = [_rows("a")[0], {"prompt": "q", "response": "b"}]
    with pytest.raises(ConfigError, match=r"a\.jsonl and b\.jsonl: row 2: the prompts differ"):
        pair_rows(_rows("a", "b"), other, "a.jsonl and b.jsonl")
    with pytest.raises(ConfigError, match="2 responses cannot be paired with 1"):
        pair_rows(_rows("a", "b"), _rows("a"), "a.jsonl and b.jsonl")
