"""Training on rows that come with their answer: SFT, reward model and DPO are this one trainer with three losses."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from megatron_gil.config import OptimizerSection
from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.engine.optimizer import learning_rate
from megatron_gil.engine.protocol import Engine, Part, Update
from megatron_gil.parallel.collectives import all_sum
from megatron_gil.training.row_source import RowSource, truncated_fraction
from megatron_gil.training.run.metrics import Means
from megatron_gil.training.run.progress import Progress
from megatron_gil.training.run.samples import row_samples
from megatron_gil.training.supervised.objectives import Objective
from megatron_gil.types import Metrics, count_terms


class SupervisedTrainer:
    """One update an iteration."""

    def __init__(
        self,
        role: str,
        model: Engine,
        objective: Objective,
        *,
        optimizer: OptimizerSection,
        rows: RowSource,
        eval_rows: RowSource | None,
        num_iterations: int,
        progress: Progress,
        tokenizer: Tokenizer,
        prepare: Callable[[Any], Any] = lambda batch: batch,
    ) -> None:
        """role: the model's name in a checkpoint. prepare: what a batch needs before it meets the loss."""
        self.num_iterations = num_iterations
        self.line = (*objective.line, f"{role}/gradient_norm", "time/tokens_per_s")
        self._role, self._model, self._objective, self._optimizer = role, model, objective, optimizer
        self._rows, self._eval_rows, self._prepare = rows, eval_rows, prepare
        self._progress, self._tokenizer = progress, tokenizer
        self._layout, self._all_sum = rows.layout, all_sum(rows.layout)
        self._last_batch: Any = None
        self._last_update = Update(metrics={})

    def iterate(self, iteration: int) -> Metrics:
        started = time.perf_counter()
        batch = self._rows.batch(iteration)
        self._progress.enter("scoring", batch)
        batch = self._prepare(batch)
        loaded = time.perf_counter()
        lr = learning_rate(self._optimizer, update=iteration, num_updates=self.num_iterations)
        self._progress.safe_point(f"{self._role} update", batch)
        objective = self._objective
        part = Part(batch=batch, loss_fn=objective.loss_fn, per=objective.per, row_numbers=objective.row_numbers)
        self._last_batch, self._last_update = batch, self._model.update(part, lr=lr)
        num_tokens = float(self._all_sum(batch.lengths.sum()))
        seconds = time.perf_counter() - started
        metrics = self._last_update.metrics
        own = {name if "/" in name else f"{self._role}/{name}": value for name, value in metrics.items()}
        cut = self._rows.dataset.truncated(batch.row_ids.tolist())
        return {
            **own,
            "data/truncated_fraction": truncated_fraction(cut, self._layout, self._all_sum),
            "time/data_s": loaded - started,
            "time/iteration_s": seconds,
            "time/tokens_per_s": num_tokens / seconds,
        }

    def evaluate(self) -> Metrics:
        """The loss's metrics on all held-out rows, under eval/."""
        if self._eval_rows is None:
            return {}
        sums: dict[str, torch.Tensor] = {}
        count = torch.zeros((), dtype=torch.float64, device=self._layout.device)
        before_batch = partial(self._progress.safe_point, "evaluation")
        for batch in map(self._prepare, self._eval_rows.all_batches(before_batch)):
            loss = self._objective.loss_fn(self._model.evaluate(batch), batch)
            count = count + count_terms(batch, self._objective.per)
            for name, value in loss.metrics.items():
                sums[name] = sums.get(name, 0.0) + value.double()
        means = Means()
        for name, value in sums.items():
            means.add(f"eval/{name}", value / count.clamp(min=1), count)
        return means.reduce(self._all_sum)

    def samples(self, count: int) -> list[dict[str, Any]]:
        """Rows of the last update with what the model said of them before it."""
        numbers, names = self._last_update.row_numbers, self._objective.row_numbers.names
        assert numbers is not None
        return row_samples(self._last_batch, numbers, names, self._tokenizer, count)

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        assert not state

    def extra_config(self) -> dict[str, dict[str, Any]]:
        return {}

    def take_warnings(self) -> list[str]:
        return []
