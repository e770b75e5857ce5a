"""How far two gradients, or two losses, are from one another."""

from __future__ import annotations

from torch import Tensor


def worst_gradient(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """max |a - b| / max |b| of the worst tensor; the same tensors must be on both sides, none of them zero."""
    assert found.keys() == expected.keys()
    assert all(tensor.any() for tensor in expected.values())
    return max(float((found[name] - b).abs().max() / b.abs().max()) for name, b in expected.items())


def relative(found: float, expected: float) -> float:
    return abs(found - expected) / abs(expected)
