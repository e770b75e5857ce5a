"""Where the KL to the reference is going: the line through its last values, of the batch and of each inferred group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_gil.types import Metrics

WINDOW, AHEAD = 15, 20
"""Iterations that a line is laid through, so that the noise of a batch does not decide; and that it is drawn on."""


class KlTrends:
    """Remembers the KL a response of the last iterations."""

    def __init__(self) -> None:
        self._past: dict[str, list[float]] = {}

    def add(self, metrics: Metrics) -> dict[str, float]:
        """With this iteration's KLs taken in, of the batch and, with the ending _group_G, of each group:

        policy/kl_slope, nats a response and iteration, and policy/kl_ahead, the KL that the line reaches in AHEAD
        iterations more, nats a response. Left out until there has been a finite KL in WINDOW iterations in a row.
        """
        now = {ending: kl for ending, kl in _kls(metrics).items() if math.isfinite(kl)}
        self._past = {ending: [*self._past.get(ending, []), kl][-WINDOW:] for ending, kl in now.items()}
        found: dict[str, float] = {}
        for ending, kls in self._past.items():
            if len(kls) == WINDOW:
                slope = slope_of(kls)
                found[f"policy/kl_slope{ending}"] = slope
                found[f"policy/kl_ahead{ending}"] = math.fsum(kls) / WINDOW + slope * ((WINDOW - 1) / 2 + AHEAD)
        return found

    def state(self) -> dict[str, Any]:
        return {"past": self._past}

    def load_state(self, state: dict[str, Any]) -> None:
        self._past = dict(state["past"])


def slope_of(values: Sequence[float]) -> float:
    """Of the line of least squares through values at 0, 1, 2, ...; at least two."""
    middle = (len(values) - 1) / 2
    products = math.fsum((place - middle) * value for place, value in enumerate(values))
    return products / math.fsum((place - middle) ** 2 for place in range(len(values)))


def _kls(metrics: Mapping[str, float]) -> dict[str, float]:
    """Ending of the metric's name -> KL."""
    prefix = "policy/kl"
    groups = {name.removeprefix(prefix): kl for name, kl in metrics.items() if name.startswith(f"{prefix}_group_")}
    return {"": metrics["policy/kl_sequence"], **groups}
