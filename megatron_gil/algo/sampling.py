"""Choosing the next token: penalty, temperature, top-k and top-p, then the inverse of the distribution function."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_ONE = 2.0**53


def penalize_repetition(
    logits: Float[Tensor, "batch vocab"],
    tokens: Int[Tensor, "batch pos"],
    present: Bool[Tensor, "batch pos"],
    penalty: float,
) -> Float[Tensor, "batch vocab"]:
    """Logits of tokens in the row divided (positive) or multiplied (negative) by `penalty` (arXiv 1909.05858)."""
    seen = torch.zeros_like(logits).scatter_add_(1, tokens, present.to(logits.dtype)) > 0
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Float[Tensor, "batch vocab"], k: int) -> Float[Tensor, "batch vocab"]:
    """Everything below the k-th largest logit to -inf; ties with it stay. k = 0 keeps all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    threshold = logits.topk(k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < threshold, float("-inf"))


def keep_top_p(logits: Float[Tensor, "batch vocab"], p: float) -> Float[Tensor, "batch vocab"]:
    """The smallest set of most probable tokens whose mass reaches p (arXiv 1904.09751); the rest to -inf."""
    if p >= 1.0:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    weights = _whole_weights(ordered.double().softmax(-1))
    mass_before = weights.cumsum(-1) - weights
    drop = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, mass_before >= p * _ONE)
    return logits.masked_fill(drop, float("-inf"))


def choose_tokens(
    logits: Float[Tensor, "batch vocab"],
    uniforms: Float[Tensor, " batch"],
    *,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"]]:
    """(token, its log-prob under the distribution sampled from), by inverting the distribution function at `uniforms`.

    uniforms lie in [0, 1). Temperature 0 takes the most probable token, log-prob 0. Because the only randomness comes
    in as an argument, every tensor-parallel rank chooses the same token.
    """
    if temperature == 0:
        return logits.argmax(-1), torch.zeros_like(uniforms)
    kept = keep_top_p(keep_top_k(logits / temperature, top_k), top_p)
    probs = kept.double().softmax(-1)
    cumulative = _whole_weights(probs).cumsum(-1)
    below = (uniforms.double()[:, None] * cumulative[:, -1:]).long()  # less than the whole: uniforms are below 1
    tokens = torch.searchsorted(cumulative, below, right=True)[:, 0]
    return tokens, probs.gather(1, tokens[:, None])[:, 0].log().to(uniforms.dtype)


def _whole_weights(probs: Float[Tensor, "batch vocab"]) -> Int[Tensor, "batch vocab"]:
    """Probabilities (float64) in units of 2^-53, cut to whole numbers. Their sums are exact in any order; sums of
    floats along a row may differ on a GPU between runs."""
    return (probs * _ONE).long()
