"""How far apart two devices' answers are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

LEAST_METRIC = 0.1
"""A logged number is compared with this where it is smaller: a difference of two near numbers keeps their error."""


def flatten(found: Any) -> dict[str, Any]:
    """Tensors and numbers of a side by their path."""
    return dict(_leaves(found, ""))


def _leaves(found: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(found, dict | list):
        for name, part in found.items() if isinstance(found, dict) else enumerate(found):
            yield from _leaves(part, f"{path}/{name}" if path else str(name))
    else:
        yield path, found


def distance(ours: Any, theirs: Any) -> float:
    """Largest difference as a share of the largest value of theirs; tensors of whole numbers are equal or infinitely
    far apart."""
    if not isinstance(theirs, Tensor):
        return abs(ours - theirs) / max(abs(theirs), LEAST_METRIC)
    if ours.shape != theirs.shape or not theirs.is_floating_point():
        return 0.0 if torch.equal(ours, theirs) else float("inf")
    difference = (ours.double() - theirs.double()).abs().max()
    return float(difference / theirs.double().abs().max()) if difference != 0 else 0.0


def norm_distance(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|, the norms over all elements."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def apart(ours: Mapping[str, Any], theirs: Mapping[str, Any], tolerance: float) -> list[str]:
    """One line for whatever is further apart than the tolerance, the furthest first."""
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
    found = [(distance(value, theirs[name]), name) for name, value in ours.items()]
    far = sorted((pair for pair in found if not pair[0] <= tolerance), key=lambda pair: (-pair[0], pair[1]))
    return [f"{name}: {'not equal' if size == float('inf') else f'{size:.1e}'}" for size, name in far]
