"""Training on rows that come with their answer: SFT, reward model and DPO are this one trainer with three losses."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from megatron_gil.algo.likelihood import token_nll
from megatron_gil.algo.preference import dpo_loss, pairwise_loss
from megatron_gil.config import DpoSection, OptimizerSection, RewardSection
from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.engine.megatron import MegatronModel, TrainableModel
from megatron_gil.engine.optimizer import learning_rate
from megatron_gil.engine.protocol import LossFn, Part
from megatron_gil.parallel.collectives import share_from_last_pp_stage
from megatron_gil.training.row_source import RowSource, truncated_fraction
from megatron_gil.training.run.metrics import Means
from megatron_gil.training.run.progress import Progress
from megatron_gil.training.run.samples import row_samples
from megatron_gil.types import AllSum, LossSum, Metrics, PreferenceBatch, Readout, TokenBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class RowNumbers:
    """What samples.jsonl says of a row beside its text."""

    names: tuple[str, ...]
    read: Callable[[Readout, Any], torch.Tensor]
    """(readout, rows) -> [B, names]."""


class SupervisedTrainer:
    """One update an iteration."""

    def __init__(
        self,
        role: str,
        model: TrainableModel,
        loss_fn: LossFn,
        *,
        optimizer: OptimizerSection,
        rows: RowSource,
        eval_rows: RowSource | None,
        num_iterations: int,
        all_sum: AllSum,
        line: tuple[str, ...],
        progress: Progress,
        tokenizer: Tokenizer,
        numbers: RowNumbers,
        prepare: Callable[[Any], Any] = lambda batch: batch,
    ) -> None:
        """role: the model's name in a checkpoint. numbers: what samples.jsonl says of a row. prepare: what a batch
        needs before it meets the loss."""
        self.num_iterations, self.line, self._progress = num_iterations, line, progress
        self._role, self._model, self._loss_fn, self._optimizer = role, model, loss_fn, optimizer
        self._rows, self._eval_rows, self._all_sum, self._prepare = rows, eval_rows, all_sum, prepare
        self._tokenizer, self._numbers = tokenizer, numbers
        self._last_batch: Any = None
        self._last_numbers: list[torch.Tensor] = []  # of its microbatches; on the last pipeline rank alone

    def iterate(self, iteration: int) -> Metrics:
        started = time.perf_counter()
        batch = self._rows.batch(iteration)
        self._progress.enter("scoring", batch)
        batch = self._prepare(batch)
        loaded = time.perf_counter()
        lr = learning_rate(self._optimizer, update=iteration, num_updates=self.num_iterations)
        self._progress.safe_point(f"{self._role} update", batch)
        self._last_batch, self._last_numbers = batch, []
        metrics = self._model.update(Part(batch, self._noted_loss), lr=lr)
        num_tokens = float(self._all_sum(batch.lengths.sum()))
        seconds = time.perf_counter() - started
        own = {name if "/" in name else f"{self._role}/{name}": value for name, value in metrics.items()}
        cut = self._rows.dataset.truncated(batch.row_ids.tolist())
        return {
            **own,
            "data/truncated_fraction": truncated_fraction(cut, self._rows.layout, self._all_sum),
            "time/data_s": loaded - started,
            "time/iteration_s": seconds,
            "time/tokens_per_s": num_tokens / seconds,
        }

    def evaluate(self) -> Metrics:
        """The loss's metrics on all held-out rows, under eval/."""
        if self._eval_rows is None:
            return {}
        sums: dict[str, torch.Tensor] = {}
        count = torch.zeros((), dtype=torch.float64, device=self._model.layout.device)
        before_batch = partial(self._progress.safe_point, "evaluation")
        for batch in map(self._prepare, self._eval_rows.all_batches(before_batch)):
            loss = self._loss_fn(self._model.evaluate(batch), batch)
            count = count + loss.count
            for name, value in loss.metrics.items():
                sums[name] = sums.get(name, 0.0) + value.double()
        means = Means()
        for name, value in sums.items():
            means.add(f"eval/{name}", value / count.clamp(min=1), count)
        return means.reduce(self._all_sum)

    def samples(self, count: int) -> list[dict[str, Any]]:
        """Rows of the last update with what the model said of them before it."""
        batch, names = self._last_batch, self._numbers.names
        found = torch.cat(self._last_numbers) if self._last_numbers else None
        shape = (len(batch.tokens), len(names))
        values = share_from_last_pp_stage(found, shape, torch.float32, self._model.layout)
        return row_samples(batch, values, names, self._tokenizer, count)

    def _noted_loss(self, readout: Readout, rows: Any) -> LossSum:
        """The loss; the rows' numbers are kept on the device, for no update waits for them."""
        with torch.no_grad():
            self._last_numbers.append(self._numbers.read(readout, rows).float())
        return self._loss_fn(readout, rows)

    def models(self) -> dict[str, TrainableModel]:
        return {self._role: self._model}

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        assert not state

    def take_warnings(self) -> list[str]:
        return []


def _row_loss(readout: Readout, rows: TokenBatch) -> torch.Tensor:
    count = rows.response_mask.sum(1).clamp(min=1)
    return (-torch.where(rows.response_mask, readout.log_probs, 0).sum(1) / count)[:, None]


SFT_NUMBERS = RowNumbers(names=("loss",), read=_row_loss)
"""Nats a token of the target."""
REWARD_NUMBERS = RowNumbers(names=("score_chosen", "score_rejected"), read=lambda readout, rows: readout.scores)


def dpo_numbers(section: DpoSection) -> RowNumbers:
    """The implicit rewards, beta (log pi - log pi_ref)."""

    def read(readout: Readout, rows: PreferenceBatch) -> torch.Tensor:
        return section.beta * (response_log_probs(readout, rows) - rows.ref_log_probs)

    return RowNumbers(names=("reward_chosen", "reward_rejected"), read=read)


def sft_loss(readout: Readout, rows: TokenBatch) -> LossSum:
    return token_nll(readout.log_probs, rows.response_mask)


def reward_loss_fn(section: RewardSection) -> LossFn:
    def loss(readout: Readout, rows: PreferenceBatch) -> LossSum:
        return pairwise_loss(readout.scores, center_coef=section.center_coef)

    return loss


def dpo_loss_fn(section: DpoSection) -> LossFn:
    def loss(readout: Readout, rows: PreferenceBatch) -> LossSum:
        return dpo_loss(
            response_log_probs(readout, rows),
            rows.ref_log_probs,
            beta=section.beta,
            label_smoothing=section.label_smoothing,
        )

    return loss


def fill_ref_log_probs(batch: PreferenceBatch, ref_policy: MegatronModel) -> PreferenceBatch:
    """The pairs with what the frozen reference says of them."""
    return replace(batch, ref_log_probs=response_log_probs(ref_policy.evaluate(batch), batch))


def response_log_probs(readout: Readout, rows: PreferenceBatch) -> torch.Tensor:
    """[B, 2] log-prob of each response, summed over its tokens."""
    return torch.where(rows.response_mask, readout.log_probs, 0).sum(-1)
