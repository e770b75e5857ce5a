"""What reward model and classifier say of held-out rows, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor

from megatron_gil.config import AuditConfig
from megatron_gil.data.rows.dataset import RowDataset
from megatron_gil.engine.protocol import FrozenEngine
from megatron_gil.evaluation.audit.rows import TrustedRow, likeliest
from megatron_gil.evaluation.scored_pairs import ScoredPair
from megatron_gil.parallel.collectives import gather_objects
from megatron_gil.training.audit.rows import HeldOut
from megatron_gil.training.check_run import path_of
from megatron_gil.training.ppo.iteration import PpoTrainer
from megatron_gil.training.row_source import RowSource
from megatron_gil.training.run.loop import RunFailed

Read = Callable[[Any], Tensor]
"""A batch of this rank's rows -> [B, ...]."""


def read_all(rows: RowDataset[Any], read: Read, trainer: PpoTrainer, phase: str) -> list[Any]:
    """What `read` gives of every row, in their order, as lists of numbers; on every rank."""
    progress, layout = trainer.progress, trainer.layout
    source = RowSource(rows, None, layout, trainer.config.batch.micro_size)
    found: dict[int, Any] = {}
    for batch in source.all_batches(partial(progress.safe_point, phase)):
        progress.enter(phase, batch)
        found |= zip(batch.row_ids.tolist(), read(batch).tolist(), strict=True)
    merged = {row: values for part in gather_objects(found, layout) for row, values in part.items()}
    return [merged[row] for row in range(len(rows))]


def score_rows(held_out: HeldOut, reward_model: FrozenEngine, trainer: PpoTrainer, config: AuditConfig) -> list[Any]:
    """Of each row its score, or those of the chosen and of the rejected response. RunFailed for a NaN."""

    def read(batch: Any) -> Tensor:
        return reward_model.evaluate(batch).scores

    scores = read_all(held_out.as_scored, read, trainer, f"scoring {held_out.key}")
    bad = [row for row, values in enumerate(scores) if not all(map(math.isfinite, _flat(values)))]
    if bad:
        raise RunFailed(
            f"models.reward_model={config.models.reward_model} gives {len(bad)} rows no score (the first: row "
            f"{bad[0] + 1} of {path_of(config, held_out.key)}); no output is written"
        )
    return scores


def group_rows(held_out: HeldOut, trainer: PpoTrainer) -> list[int]:
    """Of each row the likeliest group, of a pair in the mean of its two responses."""
    grouping, rows = trainer.grouping, held_out.rows
    if not grouping.learns:
        names = trainer.prompts.dataset.group_names
        return [names.index(rows.group_names[i]) for i in rows.known_groups(range(len(rows)))]
    engine = trainer.models.classifier or trainer.models.critic
    assert engine is not None, "a classifier has a model"

    def read(batch: Any) -> Tensor:
        probs = grouping.probs(batch, engine.evaluate(batch))
        return probs if probs.dim() == 2 else probs.mean(1)

    return [likeliest(probs) for probs in read_all(rows, read, trainer, f"grouping {held_out.key}")]


def audited_pairs(held_out: HeldOut, scores: list[Any], groups: list[str]) -> Iterator[ScoredPair]:
    """groups: of each row, the name of its likeliest."""
    for row, (chosen, rejected) in enumerate(scores):
        yield ScoredPair(
            **held_out.rows.fields(row),
            score_chosen=chosen,
            score_rejected=rejected,
            group=groups[row],
            source=held_out.key,
        )


def audited_trusted(held_out: HeldOut, scores: list[Any], groups: list[str]) -> Iterator[TrustedRow]:
    for row, score in enumerate(scores):
        fields = held_out.rows.fields(row)
        yield TrustedRow(
            prompt=fields["prompt"],
            response=fields["response"],
            trusted=fields["trusted"],
            score=score,
            group=groups[row],
        )


def _flat(values: Any) -> list[float]:
    return values if isinstance(values, list) else [values]
