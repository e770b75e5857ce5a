"""The seam between the loops and the engine: two verbs, nothing of ranks, devices or microbatches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from megatron_gil.types import LossSum, Metrics, Readout

LossFn = Callable[[Readout, Any], LossSum]
"""(readout of a microbatch, the microbatch) -> sums over it."""


class FrozenEngine(Protocol):
    def evaluate(self, batch: Any) -> Readout:
        """What the model says of this rank's rows (types with `tokens` and `lengths`); no gradient."""
        ...


class Engine(FrozenEngine, Protocol):
    def update(self, batch: Any, loss_fn: LossFn) -> Metrics:
        """One optimizer step on sum(total) / sum(count) over all ranks; the same for any cut of the batch."""
        ...
