"""The seam between the loops and the engine: two verbs, nothing of ranks, devices or microbatches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_gil.types import LossSum, Metrics, PromptBatch, Readout, Rollout

LossFn = Callable[[Readout, Any], LossSum]
"""(readout of a microbatch, the microbatch) -> sums over it."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of this rank, and their share of an update."""

    batch: Any
    loss_fn: LossFn
    temperature: float = 1.0
    """Of the log-probs that the loss reads."""


class FrozenEngine(Protocol):
    def evaluate(self, batch: Any, *, entropy: bool = False, temperature: float = 1.0) -> Readout:
        """What the model says of this rank's rows (types with `tokens` and `lengths`); no gradient."""
        ...


class Engine(FrozenEngine, Protocol):
    def update(self, *parts: Part, lr: float) -> Metrics:
        """One optimizer step on sum(total) / sum(count) over all ranks and parts; the same for any cut of a batch."""
        ...


Meet = Callable[[bool], Callable[[], bool]]
"""All ranks meet every few tokens: called with whether this rank still has rows to answer, it returns at once; what it
returned, called later, waits for the other ranks and says whether any of them has. It raises, on all ranks alike, where
they agree to stop."""


class Sampler(Protocol):
    """What answers prompts: a model of this run, or a server."""

    def sample(self, prompts: PromptBatch, *, meet: Meet) -> Rollout:
        """A response to each prompt, on every rank of a model copy. All ranks of the world call it together and meet
        as often, those without rows too. Randomness is a function of the rows' sample ids."""
        ...
