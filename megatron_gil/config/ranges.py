"""The range of every number in a config, declared with its field and checked as its section is made."""

from __future__ import annotations

import math
import sys
from dataclasses import Field, dataclass, field, fields
from typing import Any

RANGE = "range"
"""Key of a field's metadata."""
LARGEST_INTEGER = 10**9
"""Where a field names no bound of its own: more than any count here, and far from the limits of the libraries."""

LARGEST_SEED = 2**32 - 1
"""What every random generator here takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """An interval of finite numbers. NaN and infinity lie in none."""

    low: float
    high: float
    with_low: bool = True
    with_high: bool = True

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.with_low else value > self.low
        below = value <= self.high if self.with_high else value < self.high
        return above and below and -sys.float_info.max <= value <= sys.float_info.max

    def __str__(self) -> str:
        low = f"{'at least' if self.with_low else 'above'} {self.low:.17g}" if self.low > -math.inf else ""
        high = f"{'at most' if self.with_high else 'below'} {self.high:.17g}" if self.high < math.inf else "finite"
        return f"{low} and {high}" if low else high


def integer(default: int | None, *, least: int = 0, most: int = LARGEST_INTEGER) -> Any:
    """A field of a whole number in [least, most]."""
    return field(default=default, metadata={RANGE: Range(low=least, high=most)})


def real(
    default: float | None,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Any:
    """A field of a finite number within these bounds."""
    low, high = (least if above is None else above), (most if below is None else below)
    bounds = Range(
        low=-math.inf if low is None else low,
        high=math.inf if high is None else high,
        with_low=above is None,
        with_high=below is None,
    )
    return field(default=default, metadata={RANGE: bounds})


def outside(section: Any) -> str:
    """What is wrong with the first number of a section that lies outside its range; empty where none does."""
    return next((text for f in fields(section) if (text := refusal(f, getattr(section, f.name)))), "")


def refusal(number: Field[Any], value: Any) -> str:
    """NAME=VALUE must be RANGE; empty for a value within the field's range, and for a field that has none."""
    bounds = number.metadata.get(RANGE)
    if bounds is None or value is None or value in bounds:
        return ""
    try:
        shown = f"{value!r:.50}"
    except ValueError:  # python does not write out an integer of thousands of digits
        shown = "an integer of thousands of digits"
    return f"{number.name}={shown} must be {bounds}"
