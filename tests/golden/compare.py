"""How far apart two curves are."""

from __future__ import annotations

import math

from tests.golden.runs import Rows

ABSOLUTE = 1e-6
"""What float32 sums leave of a number that is zero in exact arithmetic, such as the first loss of a policy."""
COUNTED = {"critic/clip_fraction": 3 / 96}
"""Tokens whose clipped error is the larger, if only by the rounding of a value that is not clipped: three of an
iteration's 96 may be another's. One was the most measured."""


def apart(found: Rows, expected: Rows, tolerance: float) -> list[str]:
    """What differs by more than `tolerance` of the largest value of its metric (and the constants above), one line
    each. With tolerance 0, whatever differs at all."""
    if len(found) != len(expected):
        return [f"{len(found)} rows instead of {len(expected)}"]
    lines = []
    for name in dict.fromkeys(name for row in (*expected, *found) for name in row):
        scale = max((abs(row[name]) for row in expected if row.get(name) is not None), default=0.0)
        allowed = tolerance * scale + COUNTED.get(name, ABSOLUTE) if tolerance else 0.0
        for iteration, (row, wanted) in enumerate(zip(found, expected, strict=True)):
            a, b = row.get(name), wanted.get(name)
            if (name in row) != (name in wanted) or not _close(a, b, allowed):
                lines.append(f"{name} of iteration {iteration}: {a!r} instead of {b!r}")
    return lines


def _close(a: float | None, b: float | None, allowed: float) -> bool:
    if a is None or b is None or math.isnan(a) or math.isnan(b):
        return a is b
    return abs(a - b) <= allowed
