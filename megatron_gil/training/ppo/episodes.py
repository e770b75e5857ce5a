"""When an alarm begins and when it ends, so that a number that hovers at its threshold speaks once."""

from __future__ import annotations

from typing import Any

RELEASE, RELEASE_AFTER = 0.8, 5
"""An alarm that stands ends in the iteration in which its level has been below the first for so many in a row."""


class Episodes:
    """Which alarms stand. A level says how near a number is to its threshold: 1 there, more beyond it."""

    def __init__(self) -> None:
        self._quiet: dict[str, int] = {}  # of each alarm that stands: iterations in a row below RELEASE

    def begins(self, name: str, level: float) -> bool:
        """Take in an iteration's level; whether the alarm begins with it. A NaN neither begins nor ends one."""
        if name not in self._quiet:
            if level > 1:
                self._quiet[name] = 0
            return level > 1
        self._quiet[name] = self._quiet[name] + 1 if level < RELEASE else 0
        if self._quiet[name] == RELEASE_AFTER:
            del self._quiet[name]
        return False

    def stands(self, name: str) -> bool:
        return name in self._quiet

    def state(self) -> dict[str, Any]:
        return dict(self._quiet)

    def load_state(self, state: dict[str, Any]) -> None:
        self._quiet = dict(state)
