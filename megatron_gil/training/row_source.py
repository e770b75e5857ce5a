"""Rows for the loops: a data set, an order, and the deal of global rows to data-parallel ranks.

What iteration k gets is a pure function of (seed, k): no position is kept, and a resumed run reads on exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self, TypeVar

import torch

from megatron_gil.config import PpoConfig, TrainConfig
from megatron_gil.data.rows.order import RowOrder
from megatron_gil.data.rows.prompts import PromptDataset
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.types import AllSum, PromptBatch, take_rows

Rows = TypeVar("Rows")

EVALUATION = 1 << 62
"""First sample id of rows that are not trained on."""
ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class RowSource:
    """Batches of demonstrations, preferences or texts."""

    dataset: Any
    order: RowOrder | None  # None: only all_batches is called
    layout: ParallelLayout
    micro_size: int

    @classmethod
    def shuffled(cls, dataset: Any, config: TrainConfig, layout: ParallelLayout) -> Self:
        """Rows of updates, in an order that run.seed gives."""
        order = RowOrder(
            len(dataset),
            seed=config.run.seed,
            batch_size=config.batch.global_size,
            dp_size=layout.dp_size,
            dp_rank=layout.dp_rank,
        )
        return cls(dataset, order, layout, config.batch.micro_size)

    def batch(self, update: int) -> Any:
        """This rank's rows of update number `update`."""
        assert self.order is not None
        row_ids, _ = self.order.next(update * self.order.batch_size)
        return self.read(row_ids)

    def all_batches(self, before_batch: Callable[[], None]) -> Iterator[Any]:
        """Every row of the data set once, over all data-parallel ranks; `before_batch` is called as often on each."""
        yield from map(self.read, self.all_row_ids(before_batch))

    def all_row_ids(self, before_batch: Callable[[], None], *, done: Collection[int] = ()) -> Iterator[list[int]]:
        """The row ids of these batches, without rows that are `done`."""
        for row_ids in _deal(len(self.dataset), self.micro_size, self.layout, done):
            before_batch()
            if row_ids:
                yield row_ids

    def read(self, row_ids: Sequence[int]) -> Any:
        """These rows, in that order."""
        return to_device(self.dataset.collate(row_ids), self.layout)


@dataclass(frozen=True, slots=True)
class PromptSource:
    """The prompts of each rollout, every one repeated responses_per_prompt times in consecutive rows."""

    dataset: PromptDataset
    order: RowOrder | None  # None: only all_batches is called
    layout: ParallelLayout

    num_rows: int
    """Rows of one rollout over all ranks."""

    @classmethod
    def shuffled(cls, dataset: PromptDataset, config: PpoConfig, layout: ParallelLayout) -> Self:
        """Prompts of rollouts, in an order that run.seed gives."""
        order = RowOrder(
            len(dataset),
            seed=config.run.seed,
            batch_size=config.ppo.prompts,
            dp_size=layout.dp_size,
            dp_rank=layout.dp_rank,
            repeats=config.ppo.responses_per_prompt,
            minibatch_size=config.batch.global_size,
        )
        return cls(dataset, order, layout, config.ppo.num_rows)

    def batch(self, iteration: int) -> PromptBatch:
        """This rank's prompts; a sample id is never used twice in a run, and seeds the row's sampling."""
        assert self.order is not None
        row_ids, places = self.order.next(iteration * self.order.batch_size)
        sample_ids = [iteration * self.num_rows + place for place in places]
        return to_device(self.dataset.collate(row_ids, sample_ids), self.layout)

    def all_batches(self, size: int = ROWS_AT_ONCE, *, done: Collection[int] = ()) -> Iterator[PromptBatch]:
        """Every prompt that is not `done` once, over all data-parallel ranks; sample ids apart from those of training.

        As many batches on each rank, the last of them perhaps without rows; of at most `size`: that many responses
        are held in memory, and lost by a stop.
        """
        for row_ids in _deal(len(self.dataset), size, self.layout, done):
            some = row_ids or [0]
            batch = self.dataset.collate(some, [EVALUATION + i for i in some])
            yield to_device(take_rows(batch, slice(len(row_ids))), self.layout)


def _deal(num_rows: int, size: int, layout: ParallelLayout, done: Collection[int] = ()) -> list[list[int]]:
    """This rank's rows in batches; as many batches on every rank, some of which may be empty. Rows that are done leave
    a gap, so that the others stay in the batches that they would be in without them."""
    step = size * layout.dp_size
    left = [[row for row in range(i, min(i + step, num_rows)) if row not in done] for i in range(0, num_rows, step)]
    return [[row for row in rows if row % layout.dp_size == layout.dp_rank] for rows in left if rows]


def truncated_fraction(flags: Sequence[bool] | torch.Tensor, layout: ParallelLayout, all_sum: AllSum) -> float:
    """Share of rows over all data-parallel ranks; `flags` [B] says which of this rank's were cut to fit."""
    cut = torch.as_tensor(flags, device=layout.device).long()
    num_cut, num_rows = all_sum(torch.stack([cut.sum(), torch.ones_like(cut).sum()])).tolist()
    return num_cut / num_rows


def to_device(batch: Rows, layout: ParallelLayout) -> Rows:
    """The batch's tensors on this rank's device."""
    values = {f.name: getattr(batch, f.name).to(layout.device) for f in fields(batch)}  # type: ignore[arg-type]
    return replace(batch, **values)  # type: ignore[type-var]
