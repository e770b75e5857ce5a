from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gil.data.rows.order import RowOrder, owned_rows

sizes = st.integers(1, 40)


def global_rows(order: RowOrder, num_batches: int) -> list[int]:
    return [row for i in range(num_batches) for row in order.next(i * order.batch_size).row_ids]


@settings(deadline=None)
@given(num_rows=sizes, batch_size=sizes, seed=st.integers(-5, 2**70))
def test_every_epoch_holds_every_row_once(num_rows: int, batch_size: int, seed: int):
    num_epochs = 4
    rows = global_rows(RowOrder(num_rows, seed=seed, batch_size=batch_size), -(-num_epochs * num_rows // batch_size))
    for epoch in range(num_epochs):
        assert sorted(rows[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


@settings(deadline=None)
@given(batch_size=sizes, extra=st.integers(0, 60))
def test_no_batch_holds_a_row_twice(batch_size: int, extra: int):
    order = RowOrder(batch_size + extra, seed=3, batch_size=batch_size)
    for i in range(12):
        assert len(set(order.next(i * batch_size).row_ids)) == batch_size


def test_orders_differ_between_epochs_and_seeds():
    orders = {
        tuple(RowOrder(50, seed=seed, batch_size=50).next(50 * epoch).row_ids) for seed in (1, 2) for epoch in (0, 1)
    }
    assert len(orders) == 4


@settings(deadline=None)
@given(num_rows=sizes, batch_size=sizes, stop=st.integers(0, 20))
def test_a_resume_continues_where_it_stopped(num_rows: int, batch_size: int, stop: int):
    running = RowOrder(num_rows, seed=1, batch_size=batch_size)
    for i in range(stop):
        running.next(i * batch_size)
    resumed = RowOrder(num_rows, seed=1, batch_size=batch_size)
    assert resumed.next(stop * batch_size) == running.next(stop * batch_size)
    assert running.next(0) == RowOrder(num_rows, seed=1, batch_size=batch_size).next(0)  # and back


def test_the_order_is_the_same_on_every_machine_and_version():
    assert RowOrder(10, seed=7, batch_size=5).next(0).row_ids == [8, 4, 1, 6, 3]
    assert RowOrder(10, seed=7, batch_size=4).next(8).row_ids == [9, 0, 3, 1]  # two rows of each epoch


@pytest.mark.parametrize("repeats", [1, 3])
def test_any_number_of_ranks_draws_the_same_minibatches(repeats: int):
    layout = {"batch_size": 24, "repeats": repeats, "minibatch_size": 12}
    alone = RowOrder(31, seed=5, **layout)
    for position in (0, 24, 48):
        whole = alone.next(position)
        assert whole.sample_ids == list(range(24 * repeats))
        assert whole.row_ids == [row for row in whole.row_ids[::repeats] for _ in range(repeats)]
        for dp_size in (2, 3, 4):
            draws = [RowOrder(31, seed=5, dp_size=dp_size, dp_rank=d, **layout).next(position) for d in range(dp_size)]
            share = 12 // dp_size
            for start in range(0, 24 * repeats, 12):
                local = slice(start // dp_size, start // dp_size + share)
                assert [i for draw in draws for i in draw.sample_ids[local]] == list(range(start, start + 12))
                assert [r for draw in draws for r in draw.row_ids[local]] == whole.row_ids[start : start + 12]


@given(share=st.integers(1, 5), dp_size=st.integers(1, 6), num_minibatches=st.integers(1, 5))
def test_ownership_is_minibatch_then_rank_then_row(share: int, dp_size: int, num_minibatches: int):
    size = share * dp_size
    owners: Counter[int] = Counter()
    for rank in range(dp_size):
        owned = owned_rows(size * num_minibatches, size, dp_size, rank)
        oracle = [row for row in range(size * num_minibatches) if row % size // share == rank]
        assert owned == oracle
        owners.update(owned)
    assert set(owners.values()) == {1}
    assert len(owners) == size * num_minibatches


def test_a_large_data_set_is_fast_to_enter():
    order = RowOrder(1_000_000, seed=1, batch_size=512)
    assert len(set(order.next(3_000_000 // 512 * 512).row_ids)) == 512
