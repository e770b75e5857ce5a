import json
from dataclasses import asdict

import pytest
import torch

from megatron_gil.algo.groups import HighGroup


def update(high, scores, counts=None, decay=0.9):
    counts = [True] * len(scores) if counts is None else counts
    return high.update(torch.tensor(scores, dtype=torch.float64), torch.tensor(counts), decay=decay)


def test_ema_is_the_loop_and_the_first_score_is_taken_as_it_is():
    high, ema = HighGroup.start(2), None
    for scores in ([1.0, 3.0], [2.0, 0.0], [5.0, -1.0]):
        high = update(high, scores)
        ema = scores if ema is None else [0.9 * e + 0.1 * s for e, s in zip(ema, scores, strict=True)]
        assert high.ema == pytest.approx(ema)
        assert high.index == ema.index(max(ema))


def test_starts_at_group_zero_and_flips_only_when_the_average_does():
    high = HighGroup.start(2)
    assert high.index == 0
    high = update(high, [1.0, 0.0])
    assert update(high, [0.0, 5.0]).index == 0  # averages 0.9 and 0.5
    assert update(high, [0.0, 50.0]).index == 1


def test_a_group_that_does_not_count_keeps_its_average_and_is_not_high_before_it_ever_counted():
    high = update(HighGroup.start(2), [-1.0, 99.0], counts=[True, False])
    assert high == HighGroup(ema=(-1.0, None), index=0)
    high = update(high, [7.0, -2.0], counts=[False, True])
    assert high == HighGroup(ema=(-1.0, -2.0), index=0)
    assert update(HighGroup.start(2), [99.0, -1.0], counts=[False, True]).index == 1
    assert update(HighGroup.start(2), [1.0, 2.0], counts=[False, False]) == HighGroup.start(2)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_tie_leaves_the_high_group_where_it_is(index):
    high = HighGroup(ema=(1.0, 1.0, 1.0), index=index)
    assert update(high, [1.0, 1.0, 1.0], decay=0.5).index == index


def test_swapped_labels_swap_the_index():
    scores = [[1.0, 2.0, 0.0], [4.0, -1.0, 2.0], [0.5, 0.5, 3.0]]
    high = swapped = HighGroup.start(3)
    for row in scores:
        high, swapped = update(high, row), update(swapped, row[::-1])
    assert swapped.ema == high.ema[::-1]
    assert swapped.index == 2 - high.index


def test_survives_json_bit_for_bit():
    high = update(update(HighGroup.start(3), [0.1, 0.2, 0.3], counts=[True, True, False]), [1 / 3, 0.7, 0.0])
    state = json.loads(json.dumps(asdict(high)))
    assert HighGroup(ema=tuple(state["ema"]), index=state["index"]) == high
