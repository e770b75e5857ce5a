"""Sampling one token of one row, slowly and in plain Python."""

from __future__ import annotations

import math

INF = float("inf")


def choose(logits: list[float], uniform: float, temperature: float, top_k: int, top_p: float) -> tuple[int, float]:
    """(token, log-prob) of one row: probabilities sorted, cut, renormalised, and walked through in token order."""
    scaled = [x / temperature for x in logits]
    if 0 < top_k < len(scaled):
        bound = sorted(scaled)[-top_k]
        scaled = [x if x >= bound else -INF for x in scaled]
    probs = _softmax(scaled)
    if top_p < 1:
        mass, kept = 0.0, set()
        for token in sorted(range(len(probs)), key=lambda i: -probs[i]):
            if mass >= top_p:
                break
            kept.add(token)
            mass += probs[token]
        probs = [p if i in kept else 0.0 for i, p in enumerate(probs)]
        probs = [p / sum(probs) for p in probs]
    mass = 0.0
    for token, prob in enumerate(probs):
        mass += prob
        if uniform < mass:
            return token, math.log(prob)
    raise AssertionError("the uniform number is not below 1")


def _softmax(values: list[float]) -> list[float]:
    weights = [math.exp(x - max(values)) for x in values]
    return [w / sum(weights) for w in weights]


def penalize(logits: list[float], tokens: list[int], penalty: float) -> list[float]:
    """Each token of the row so far once: its logit divided by the penalty if positive, multiplied if not."""
    seen = set(tokens)
    return [x if token not in seen else x / penalty if x > 0 else x * penalty for token, x in enumerate(logits)]
