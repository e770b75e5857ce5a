"""Scores of the responses, or of both responses of the pairs, in a file: by a reward model, a function, or both."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from megatron_gil.config import AuditConfig, EvaluateRewardConfig, PpoConfig, ScoreConfig
from megatron_gil.data.rows.demonstrations import ResponseDataset
from megatron_gil.data.rows.preferences import PreferenceDataset
from megatron_gil.models.uses import has_reward_model
from megatron_gil.parallel.collectives import gather_objects
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.training.check_run import path_of
from megatron_gil.training.reward_function import RewardFunction, RewardFunctionError, reward_rows
from megatron_gil.training.row_source import RowSource
from megatron_gil.training.run.loop import RunFailed
from megatron_gil.training.run.progress import Progress

FoundScores = dict[int, list[float]]
"""Row -> its score or, of a pair, both."""


class FileScores:
    """Reads the rows of one file. One rank of each model copy calls reward.function; a failure waits for the next
    batch, because ranks do not have as many rows."""

    def __init__(
        self,
        config: ScoreConfig | EvaluateRewardConfig | AuditConfig,
        models: Mapping[str, Any],
        function: RewardFunction | None,
        rows: ResponseDataset | PreferenceDataset,
        layout: ParallelLayout,
        progress: Progress,
        *,
        key: str = "data.train",
        phase: str = "scoring",
    ) -> None:
        """models: by role. key: names the file of the rows."""
        self._config, self._key, self._rows, self._function = config, key, rows, function
        self._model, self._layout, self._progress, self._phase = models.get("reward_model"), layout, progress, phase
        self._error = ""
        self._without: FoundScores = {}

    def read(
        self, before_batch: Callable[[], None] = lambda: None, *, done: Collection[int] = ()
    ) -> Iterator[FoundScores]:
        """The scores of every row that is not `done`, batch by batch, on the first rank of each model copy; its other
        ranks get none. `before_batch` is called as often on each rank.

        RunFailed on every rank where the function has failed on one and, after the last batch, where a score is not
        finite: that means a broken model, and a NaN would lose every comparison.
        """
        source = RowSource(self._rows, None, self._layout, self._config.batch.micro_size)

        def before() -> None:
            before_batch()
            self._progress.safe_point(self._phase)
            self._check_function()

        for row_ids in source.all_row_ids(before, done=done):
            yield self._score(source, row_ids)
        self._check_function()
        self._check_finite()

    def _score(self, source: RowSource, row_ids: Sequence[int]) -> FoundScores:
        terms, section = [], self._config.reward
        if self._model is not None:
            batch = source.read(row_ids)
            self._progress.enter(self._phase, batch)
            terms.append(section.model_weight * self._model.evaluate(batch).scores.view(len(row_ids), -1))
        if not self._layout.speaks_for_copy or self._error:
            return {}
        if self._function is not None:
            rows = [row for row_id in row_ids for row in reward_rows(self._rows, row_id)]
            try:
                numbers = torch.tensor(self._function.score(rows, self._rows), dtype=torch.float32)
            except RewardFunctionError as failed:
                self._error = str(failed)
                return {}
            terms.append(section.weight * numbers.view(len(row_ids), -1).to(self._layout.device))
        found: FoundScores = dict(zip(row_ids, torch.stack(terms).sum(0).tolist(), strict=True))
        self._without |= {row: values for row, values in found.items() if not all(map(math.isfinite, values))}
        return {row: values for row, values in found.items() if row not in self._without}

    def _check_function(self) -> None:
        if self._function is None:
            return
        if errors := [error for error in gather_objects(self._error, self._layout) if error]:
            raise RunFailed(errors[0])

    def _check_finite(self) -> None:
        bad = {row: values for part in gather_objects(self._without, self._layout) for row, values in part.items()}
        if bad:
            first = min(bad)
            value = next(value for value in bad[first] if not math.isfinite(value))
            raise RunFailed(
                f"{scored_by(self._config)} gives {len(bad)} rows no score (the first: row {first + 1} of "
                f"{path_of(self._config, self._key)}, {value}); no output is written"
            )


def scored_by(config: PpoConfig | ScoreConfig | EvaluateRewardConfig) -> str:
    """Where a score comes from that is not finite. A function's own numbers are."""
    if has_reward_model(config):
        return f"models.reward_model={config.models.reward_model}"
    return f"reward.weight={config.reward.weight:g} x reward.function={config.reward.function}"
