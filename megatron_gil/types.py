"""The nouns of the project: what travels between the floors, and the legend of shapes.

    B   rows (trajectories, sequences) held by this data-parallel rank
    N   rows over all data-parallel ranks
    T   tokens in a padded row; padding is on the right, everywhere
    S   T - 1. One alignment: column t of a [B, S] tensor speaks of choosing tokens[:, t + 1]
    M   data groups of group-invariant learning
    P   prompt tokens, padded
    V   vocabulary, H hidden size

`lengths[i]` counts the real tokens of row i, so its last real token is `tokens[i, lengths[i] - 1]`.
`response_mask[i, t]` is True where the policy chose tokens[i, t + 1] (an end-of-sequence token it chose included).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

Metrics = Mapping[str, float]
"""family/name -> a number, equal on every rank."""

AllSum = Callable[[Tensor], Tensor]
"""Sums a tensor over all data-parallel ranks; returns a new tensor. On one rank: `lambda t: t.clone()`."""

Rows = TypeVar("Rows")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptBatch:
    """Prompts this rank answers."""

    tokens: Tensor  # [B, P] int64
    lengths: Tensor  # [B] int64
    row_ids: Tensor  # [B] int64: row of the prompt in its data file
    sample_ids: Tensor  # [B] int64: index of the row in the global batch, seeds its sampling
    known_groups: Tensor  # [B] int64: the label that came with the data, -1 where none; for analysis only


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """Rows to read, or to imitate where `response_mask` is True (SFT)."""

    tokens: Tensor  # [B, T] int64
    lengths: Tensor  # [B] int64
    response_mask: Tensor  # [B, S] bool
    row_ids: Tensor  # [B] int64


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceBatch:
    """Pairs: index 0 of the second axis is the chosen response, 1 the rejected one."""

    tokens: Tensor  # [B, 2, T] int64
    lengths: Tensor  # [B, 2] int64
    response_mask: Tensor  # [B, 2, S] bool
    row_ids: Tensor  # [B] int64
    ref_log_probs: Tensor  # [B, 2] float: sum over the response under ref_policy (DPO); zeros until it is scored


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """Prompts with the policy's responses."""

    tokens: Tensor  # [B, T] int64: prompt, response, padding
    lengths: Tensor  # [B] int64: prompt + response
    prompt_lengths: Tensor  # [B] int64
    response_mask: Tensor  # [B, S] bool
    sampled_log_probs: Tensor  # [B, S] float32: under the distribution really sampled from (after temperature, top-k,
    # top-p and repetition penalty); 0 outside the response
    finished: Tensor  # [B] bool: ended by an end-of-sequence token, not by the length limit
    row_ids: Tensor  # [B] int64
    sample_ids: Tensor  # [B] int64
    known_groups: Tensor  # [B] int64


_ABSENT: Any = None  # not Optional in the type: a loss that reads a field its model lacks is our mistake, not a case


@dataclass(frozen=True, slots=True, kw_only=True)
class Readout:
    """What one model says of a batch; a model fills the fields it has, the others are None.

    The same on every tensor- and pipeline-parallel rank. Leading axes are the batch's: [B], or [B, 2] for pairs.
    Columns that are not of a response are not computed: they hold 0.
    """

    log_probs: Tensor = _ABSENT  # [B, S] log pi(tokens[:, t+1] | tokens[:, :t+1]), temperature 1
    entropy: Tensor = _ABSENT  # [B, S] nats, of the next-token distribution; no gradient
    values: Tensor = _ABSENT  # [B, S] the critic's V of the state before tokens[:, t+1]
    group_logits: Tensor | None = None  # [B, M] read at the last real token
    scores: Tensor = _ABSENT  # [B] the reward model's score, read at the last real token


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Everything the four models say of a rollout, all before any update."""

    log_probs: Tensor  # [B, S] policy
    ref_log_probs: Tensor  # [B, S]
    entropy: Tensor  # [B, S] policy
    values: Tensor  # [B, S]
    group_probs: Tensor  # [B, M] float32; a row sums to 1; M = 1 is all ones
    scores: Tensor  # [B] raw score: of the reward model, of reward.function, or their weighted sum
    truncated: Tensor | None = None  # [B] bool: the scored text was cut; None: all were read whole
    model_scores: Tensor | None = None  # [B] of the reward model alone; None: there is none
    function_scores: Tensor | None = None  # [B] of reward.function alone; None: there is none


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStats:
    """Statistics of the data groups over the GLOBAL batch, equal on every rank (float64)."""

    num_rows: float  # N
    mass: Tensor  # [M] D_g = sum_i w_ig
    group_return: Tensor  # [M] J_g = sum_i w_ig R_i / D_g; 0 where the mass is 0
    mean_return: float  # Jbar, the mean of J_g over the groups that count
    variance: float  # R_var = mean_g (J_g - Jbar)^2 over the groups that count; 0 with fewer than two
    counts: Tensor  # [M] bool: mass >= min_group_mass, the group takes part


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """One iteration's rollout with every coupling settled, as constants (no gradient anywhere)."""

    tokens: Tensor  # [B, T]
    lengths: Tensor  # [B]
    response_mask: Tensor  # [B, S]
    log_probs: Tensor  # [B, S] old policy
    values: Tensor  # [B, S] old critic
    advantages: Tensor  # [B, S] A_it, whitened if asked; omega not in it
    returns: Tensor  # [B, S] value targets
    invariance_weights: Tensor  # [B] omega_i
    classifier_coefs: Tensor  # [B, M] c_ig
    row_ids: Tensor  # [B]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSum:
    """A loss as a sum over response tokens or rows. The engine divides once, by their number over all ranks."""

    total: Tensor  # scalar, differentiable
    metrics: Mapping[str, Tensor]  # name -> scalar sum, no gradient; the engine divides these too


def count_terms(batch: Any, per: Literal["token", "row"]) -> Tensor:
    """How many response tokens or rows a batch of this module has, as a tensor on its device."""
    if per == "token":
        return batch.response_mask.sum()
    return torch.full((), len(batch.tokens), dtype=torch.int64, device=batch.tokens.device)


def take_rows(batch: Rows, index: Tensor | slice) -> Rows:
    """The rows of a batch of this module that `index` picks (every field is indexed along its first axis)."""
    found = {f.name: getattr(batch, f.name) for f in fields(batch)}  # type: ignore[arg-type]
    values: dict[str, Any] = {name: value[index] for name, value in found.items() if value is not None}
    return replace(batch, **values)  # type: ignore[type-var]


_PER_TOKEN = {"tokens"}
_PER_COLUMN = {"response_mask", "sampled_log_probs", "log_probs", "values", "advantages", "returns"}


def trim(batch: Rows, num_tokens: int) -> Rows:
    """The batch padded to `num_tokens` only, at least its longest row."""
    widths = dict.fromkeys(_PER_TOKEN, num_tokens) | dict.fromkeys(_PER_COLUMN, num_tokens - 1)
    found = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name in widths}  # type: ignore[arg-type]
    values: dict[str, Any] = {name: value[..., : widths[name]] for name, value in found.items()}
    return replace(batch, **values)  # type: ignore[type-var]
