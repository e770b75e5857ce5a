"""The reward model's trainer, which also keeps the range of the scores."""

from __future__ import annotations

import math
from typing import Any

from megatron_gil.parallel.collectives import gather_objects
from megatron_gil.training.supervised.score_range import KEY, quantile_range
from megatron_gil.training.supervised.trainer import SupervisedTrainer
from megatron_gil.types import Metrics

WINDOW = 2000
"""The range is that of about so many scores, the last ones."""


class RewardTrainer(SupervisedTrainer):
    """Trains a reward model, and keeps the range of the scores that it gave to its last pairs in its directory."""

    _window: tuple[list[float], ...] = ()
    """All ranks' scores, sorted, by update: the same for every layout."""

    def iterate(self, iteration: int) -> Metrics:
        metrics = super().iterate(iteration)
        numbers = self._last_update.row_numbers
        assert numbers is not None
        mine = numbers.flatten().tolist() if self._layout.tp_rank == 0 and self._layout.is_last_pp_stage else []
        scores = sorted(score for part in gather_objects(mine, self._layout) for score in part)
        if all(map(math.isfinite, scores)):
            self._window = (*self._window, scores)
            while sum(map(len, self._window[1:])) >= WINDOW:
                self._window = self._window[1:]
        return metrics

    def extra_config(self) -> dict[str, dict[str, Any]]:
        scores = [score for update in self._window for score in update]
        return {self._role: {KEY: list(quantile_range(scores))}} if scores else {}

    def state(self) -> dict[str, Any]:
        return {"scores": self._window}

    def load_state(self, state: dict[str, Any]) -> None:
        self._window = tuple(state["scores"])
