"""What the loops know of models: engines that read and learn, samplers that answer, scorers that judge.

Nothing here speaks of ranks, devices or microbatches. Another decoder or an inference server is a class of its own with
these methods, and one line where commands/ppo.py puts the parts together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from megatron_gil.data.rows.prompts import PromptDataset
from megatron_gil.types import LossSum, Metrics, PromptBatch, Readout, Rollout

LossFn = Callable[[Readout, Any], LossSum]
"""(readout of a microbatch, the microbatch) -> sums over it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowNumbers:
    """Numbers of each row that an update reads on its way, such as its score."""

    names: tuple[str, ...]
    read: Callable[[Readout, Any], Tensor]
    """(readout, rows) -> [B, names]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A term of an update's loss: `weight` times the mean of a loss over the terms of its batch.

    Parts of one update that have the same batch object share its forward pass.
    """

    batch: Any
    """Rows of this rank."""
    loss_fn: LossFn
    weight: float = 1.0
    per: Literal["token", "row"] = "token"
    """What the mean is over: response tokens or rows, of all ranks together."""
    temperature: float = 1.0
    """Of the log-probs that the loss reads."""
    row_numbers: RowNumbers | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    metrics: Metrics
    row_numbers: Tensor | None = None
    """[B, names] of the first part, as the model was before the update; None where nothing asked for them."""


class FrozenEngine(Protocol):
    """A model that is only read."""

    def evaluate(self, batch: Any, *, entropy: bool = False, temperature: float = 1.0) -> Readout:
        """What the model says of this rank's rows (types with `tokens` and `lengths`); no gradient."""
        ...

    def offload(self) -> None:
        """Let what nobody reads for now wait in host memory, where models.offload says so."""
        ...


class Engine(FrozenEngine, Protocol):
    """A model that learns."""

    def update(self, *parts: Part, lr: float) -> Update:
        """One optimizer step on the sum of the parts; the same for any cut of a batch into ranks and microbatches."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class RowScores:
    scores: Tensor
    """[B], higher is better."""
    truncated: Tensor | None = None
    """[B] bool: its text was cut before it was scored; None where all are read whole."""
    model_scores: Tensor | None = None
    """[B] the reward model's own, without a weight; None where there is none."""
    function_scores: Tensor | None = None
    """[B] reward.function's own, without a weight; None where there is none."""


class Scorer(Protocol):
    """What the policy is trained to please: a reward model, a function, or a sum of both."""

    @property
    def name(self) -> str:
        """In messages."""
        ...

    def score(self, rollout: Rollout, prompts: PromptDataset) -> RowScores:
        """One score a row, the same on every rank of a model copy. All ranks of the world call it together, those
        without rows too.

        prompts: the data set that the rollout's row ids speak of.
        """
        ...
