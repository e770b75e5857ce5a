"""What an audit is made of: rows with their scores and what the classifier says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_gil.evaluation.scored_pairs import ScoredPair


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditedPair:
    pair: ScoredPair
    """Its group is the one that is likeliest in the mean of all readings."""
    views: tuple[str, ...] = ()
    """The likeliest group in each of several readings: of two responses of the policy to its prompt, or of the chosen
    and of the rejected one. Empty where its group is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustedRow:
    prompt: str
    response: str
    score: float
    """The reward's: of the model, the function or both."""
    trusted: float
    """What somebody trusts; higher is better."""
    group: str
    views: tuple[str, ...] = ()
    """As of a pair."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledResponse:
    prompt: str
    response: str
    score: float
    probs: tuple[float, ...]
    """Of each group, in the order of AuditedRows.groups."""
    num_tokens: int
    """Of the response, its end-of-sequence token included."""
    label: str | None
    """The known label of its prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditedRows:
    groups: tuple[str, ...]
    """Names."""
    pairs: tuple[AuditedPair, ...]
    """Empty without audit.pairs."""
    trusted: tuple[TrustedRow, ...]
    """Empty without audit.trusted."""
    responses: tuple[SampledResponse, ...]
    """Of the policy, at least one."""


def likeliest(probs: Sequence[float]) -> int:
    """The first of the groups that are likeliest."""
    return max(range(len(probs)), key=probs.__getitem__)
