"""How the KL to the reference goes on: its slope over the last iterations, of the batch and of each inferred group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_gil.types import Metrics

WINDOW = 20
"""Iterations that a slope is taken over: long enough that the noise of a batch does not decide it."""


class KlTrends:
    """Remembers the last KLs of metrics policy/kl_sequence and policy/kl_group_G."""

    def __init__(self) -> None:
        self._past: dict[str, list[float]] = {}

    def add(self, metrics: Metrics) -> dict[str, float]:
        """policy/kl_slope and policy/kl_slope_group_G with these KLs taken in, nats a response and iteration.

        A name is left out until it has had a finite KL in WINDOW iterations in a row.
        """
        now = {name: kl for name, kl in _kls(metrics).items() if math.isfinite(kl)}
        self._past = {name: [*self._past.get(name, []), kl][-WINDOW:] for name, kl in now.items()}
        return {f"policy/kl_slope{name}": slope(kls) for name, kls in self._past.items() if len(kls) == WINDOW}

    def state(self) -> dict[str, Any]:
        return {"past": self._past}

    def load_state(self, state: dict[str, Any]) -> None:
        self._past = dict(state["past"])


def slope(values: Sequence[float]) -> float:
    """Of the line of least squares through values at 0, 1, 2, ...; at least two."""
    middle = (len(values) - 1) / 2
    products = math.fsum((place - middle) * value for place, value in enumerate(values))
    return products / math.fsum((place - middle) ** 2 for place in range(len(values)))


def _kls(metrics: Mapping[str, float]) -> dict[str, float]:
    """Suffix of the metric's name -> KL of a response."""
    prefix = "policy/kl_group_"
    groups = {f"_group_{name.removeprefix(prefix)}": kl for name, kl in metrics.items() if name.startswith(prefix)}
    return {"": metrics["policy/kl_sequence"], **groups}
