"""Simulated data-parallel ranks: one thread each, and an `all_sum` in which they meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch

from megatron_gil.types import AllSum


class _Ranks:
    def __init__(self, size: int) -> None:
        self._barrier = Barrier(size, timeout=900)
        self._parts: list[Any] = [None] * size
        self.calls: list[tuple[torch.Size, torch.dtype]] = []

    def all_sum_of(self, rank: int) -> AllSum:
        def all_sum(x: torch.Tensor) -> torch.Tensor:
            self._parts[rank] = x
            self._barrier.wait()
            total = torch.stack(self._parts).sum(dim=0)
            self._barrier.wait()  # nobody overwrites a part that another rank has yet to read
            if rank == 0:
                self.calls.append((x.shape, x.dtype))
            return total

        return all_sum


@pytest.fixture(scope="session")
def on_ranks() -> Callable[..., list[Any]]:
    """`on_ranks(function, pieces)`: function(piece, all_sum) on one rank per piece; the results in rank order.

    `calls`, a list handed in, collects (shape, dtype) of every collective.
    """

    def run(function: Callable[[Any, AllSum], Any], pieces: Sequence[Any], calls: list[Any] | None = None) -> list[Any]:
        ranks = _Ranks(len(pieces))

        def one(rank: int) -> Any:
            try:
                return function(pieces[rank], ranks.all_sum_of(rank))
            except BaseException:
                ranks._barrier.abort()
                raise

        with ThreadPoolExecutor(len(pieces)) as pool:
            results = list(pool.map(one, range(len(pieces))))
        if calls is not None:
            calls.extend(ranks.calls)
        return results

    return run


@pytest.fixture(scope="session")
def one_rank() -> AllSum:
    return lambda x: x.clone()
