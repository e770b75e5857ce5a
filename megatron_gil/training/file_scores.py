"""Scores of the responses, or of both responses of the pairs, in a file: by a reward model, a function, or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_gil.config import EvaluateRewardConfig, ScoreConfig
from megatron_gil.parallel.collectives import gather_objects
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.training.check_run import CheckedRun
from megatron_gil.training.reward_function import RewardFunctionError, reward_rows
from megatron_gil.training.row_source import RowSource
from megatron_gil.training.run.loop import RunFailed
from megatron_gil.training.run.progress import Progress


class FileScores:
    """Reads the rows of data.train. One rank of each model copy calls reward.function; a failure waits for `check`,
    because ranks do not have as many rows."""

    def __init__(
        self,
        config: ScoreConfig | EvaluateRewardConfig,
        checked: CheckedRun,
        models: Mapping[str, Any],
        layout: ParallelLayout,
        progress: Progress,
    ) -> None:
        self.source = RowSource(checked.train, None, layout, config.batch.micro_size)
        self._section, self._rows, self._function = config.reward, checked.train, checked.function
        self._model, self._layout, self._progress = models.get("reward_model"), layout, progress
        self._error = ""

    def read(self, row_ids: Sequence[int]) -> list[list[float]] | None:
        """Of each row its scores, one or, of a pair, two; None after a failure. With a function they are right on the
        first tensor- and pipeline-parallel ranks alone, whose rows are written."""
        terms = []
        if self._model is not None:
            batch = self.source.read(row_ids)
            self._progress.enter("scoring", batch)
            terms.append(self._section.model_weight * self._model.evaluate(batch).scores.view(len(row_ids), -1))
        if self._function is not None:
            numbers = self._call(row_ids)
            if self._error:
                return None
            terms.append(self._section.weight * numbers.to(self._layout.device))
        return torch.stack(terms).sum(0).tolist()

    def check(self) -> None:
        """RunFailed on every rank where the function has failed on one. Collective."""
        if self._function is None:
            return
        if errors := [error for error in gather_objects(self._error, self._layout) if error]:
            raise RunFailed(errors[0])

    def _call(self, row_ids: Sequence[int]) -> torch.Tensor:
        """[B, scores] float32; zeros where another rank calls, or after a failure."""
        assert self._function is not None
        rows = [row for row_id in row_ids for row in reward_rows(self._rows, row_id)]
        found = [0.0] * len(rows)
        if self._layout.tp_rank == self._layout.pp_rank == 0 and not self._error:
            try:
                found = self._function.score(rows, self._rows)
            except RewardFunctionError as failed:
                self._error = str(failed)
        return torch.tensor(found, dtype=torch.float32).view(len(row_ids), -1)
