"""Which rows come next: a pure function of the position, so that a resume is exact, for any number of ranks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Draw(NamedTuple):
    row_ids: list[int]  # of this rank, into the data set
    sample_ids: list[int]  # of this rank: index of each row in the global batch


def owned_rows(num_rows: int, minibatch_size: int, dp_size: int, dp_rank: int) -> list[int]:
    """The rows of a global batch that a data-parallel rank holds.

    The batch is cut into minibatches of n rows, each of which is shared out over the ranks: rank d owns rows
    [k n + d n / dp, k n + (d + 1) n / dp) for every k. So a minibatch has the same rows for every dp_size.
    """
    assert num_rows % minibatch_size == 0, (num_rows, minibatch_size)
    assert minibatch_size % dp_size == 0, (minibatch_size, dp_size)
    share = minibatch_size // dp_size
    starts = range(dp_rank * share, num_rows, minibatch_size)
    return [row for start in starts for row in range(start, start + share)]


class RowOrder:
    """An endless sequence of global batches of `batch_size` distinct rows, in an order shuffled anew every epoch.

    The only state is a position, the number of rows drawn so far over all ranks: batch i is at position
    i * batch_size. A batch that begins in one epoch and ends in the next has distinct rows too, unless the data set
    is smaller than a batch. With `repeats` r the batch has each of its rows r times, one after the other: batch_size
    * r rows, dealt to the ranks as in `owned_rows`."""

    def __init__(
        self,
        num_rows: int,
        *,
        seed: int,
        batch_size: int,
        dp_size: int = 1,
        dp_rank: int = 0,
        repeats: int = 1,
        minibatch_size: int | None = None,
    ) -> None:
        assert num_rows > 0
        self.num_rows = num_rows
        self.batch_size = batch_size
        self._seed = seed
        self._repeats = repeats
        num_samples = batch_size * repeats
        self._owned = owned_rows(num_samples, minibatch_size or num_samples, dp_size, dp_rank)
        self._order = self._shuffle(0)  # of epoch self._epoch; kept, because the next order depends on it
        self._epoch = 0

    def next(self, position: int) -> Draw:
        """This rank's rows of the global batch at `position`; the batch after it is at position + batch_size."""
        batch = [self._row_at(position + i) for i in range(self.batch_size)]
        return Draw([batch[i // self._repeats] for i in self._owned], list(self._owned))

    def _row_at(self, index: int) -> int:
        epoch, offset = divmod(index, self.num_rows)
        if epoch < self._epoch:
            self._epoch, self._order = 0, self._shuffle(0)
        while self._epoch < epoch:
            self._epoch, self._order = self._epoch + 1, self._order_after(self._order, self._epoch + 1)
        return int(self._order[offset])

    def _order_after(self, previous: np.ndarray, epoch: int) -> np.ndarray:
        """The order of `epoch`. Rows that `previous`, the order before it, gives to the batch that spans both are
        moved away from the start, so that the batch has no row twice."""
        order = self._shuffle(epoch)
        in_old = epoch * self.num_rows % self.batch_size
        if in_old == 0 or self.num_rows < self.batch_size:
            return order
        fresh = np.flatnonzero(~np.isin(order, previous[-in_old:]))[: self.batch_size - in_old]
        return np.concatenate([order[fresh], np.delete(order, fresh)])

    def _shuffle(self, epoch: int) -> np.ndarray:
        # The order comes from sorting raw words of a counter-based generator, a stream that is the same in all versions
        # of numpy.
        key = np.array([self._seed % 2**64, epoch], dtype=np.uint64)
        words = np.random.Philox(key=key).random_raw(self.num_rows)
        return np.argsort(words, kind="stable")
