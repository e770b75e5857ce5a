"""Where a reward model's scores lay in its training. PPO says which share of its replies is scored outside.

It is kept as "score_range": [low, high] in the config.json of the reward model, where other programs do not look.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_gil.config import ConfigError
from megatron_gil.engine.megatron import TrainableModel
from megatron_gil.models.llama import read_config
from megatron_gil.parallel.collectives import gather_objects
from megatron_gil.training.supervised.trainer import SupervisedTrainer
from megatron_gil.types import LossSum, Metrics, Readout

KEY = "score_range"
WINDOW, QUANTILE = 2000, 0.01
"""The range leaves out 1 % of the last 2,000 scores at each end."""


class RewardTrainer(SupervisedTrainer):
    """Trains a reward model, and keeps the range of the scores that it gave to its last pairs in its directory."""

    def __init__(self, role: str, model: TrainableModel, *args: Any, **kwargs: Any) -> None:
        super().__init__(role, model, *args, **kwargs)
        self._window: list[list[float]] = []  # all ranks' scores, by update: the same for every layout
        self._seen: list[Tensor] = []
        self._plain_loss, self._loss_fn = self._loss_fn, self._watched_loss

    def _watched_loss(self, readout: Readout, rows: Any) -> LossSum:
        self._seen.append(readout.scores.detach().flatten())
        return self._plain_loss(readout, rows)

    def iterate(self, iteration: int) -> Metrics:
        self._seen.clear()  # of an evaluation
        metrics = super().iterate(iteration)
        layout = self._model.layout
        mine = [score for part in self._seen for score in part.tolist()] if layout.tp_rank == 0 else []
        scores = sorted(score for part in gather_objects(mine, layout) for score in part)
        if all(map(math.isfinite, scores)):
            self._window.append(scores)
            while sum(map(len, self._window[1:])) >= WINDOW:
                self._window.pop(0)
            self._publish()
        return metrics

    def _publish(self) -> None:
        if self._window:
            self._model.extra_config[KEY] = list(quantile_range([s for update in self._window for s in update]))

    def state(self) -> dict[str, Any]:
        return {"scores": self._window}

    def load_state(self, state: dict[str, Any]) -> None:
        self._window = state["scores"]
        self._publish()


def quantile_range(scores: list[float]) -> tuple[float, float]:
    """The scores between which all but the share QUANTILE at each end lie."""
    ordered = sorted(scores)
    rest = int(QUANTILE * len(ordered))
    return ordered[rest], ordered[-1 - rest]


def read_score_range(directory: Path) -> tuple[float, float] | None:
    """What training wrote beside the sizes; None for a model that has no such key."""
    config = read_config(directory)
    found = config.get(KEY) if isinstance(config, dict) else None
    if found is None:
        return None
    try:
        low, high = (float(bound) for bound in found)
    except (TypeError, ValueError, OverflowError):
        low, high = math.nan, math.nan
    if not isinstance(found, list) or not -math.inf < low <= high < math.inf:
        raise ConfigError(
            f"{Path(directory) / 'config.json'}: {KEY} is {found!r}, expected [low, high]; correct it or take it out"
        )
    return low, high
