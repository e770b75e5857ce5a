"""What reward and classifier say of held-out rows, over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from megatron_gil.config import AuditConfig
from megatron_gil.data.rows.dataset import RowDataset
from megatron_gil.data.rows.trusted import TrustedDataset
from megatron_gil.evaluation.audit.rows import AuditedPair, TrustedRow, likeliest
from megatron_gil.evaluation.scored_pairs import ScoredPair
from megatron_gil.parallel.collectives import gather_objects
from megatron_gil.training.audit.rows import HeldOut
from megatron_gil.training.file_scores import FileScores
from megatron_gil.training.ppo.iteration import PpoTrainer
from megatron_gil.training.reward_function import RewardFunction
from megatron_gil.training.row_source import PromptSource, RowSource

NUM_VIEWS = 2
"""Responses that are sampled for each held-out prompt to tell its group."""
Read = Callable[[Any], Tensor]
"""A batch of this rank's rows -> [B, ...]."""


def read_all(rows: RowDataset[Any], read: Read, trainer: PpoTrainer, phase: str) -> list[Any]:
    """What `read` gives of every row, in their order, as lists of numbers; on every rank."""
    progress = trainer.progress
    source = RowSource(rows, None, trainer.layout, trainer.config.batch.micro_size)
    found: dict[int, Any] = {}
    for batch in source.all_batches(partial(progress.safe_point, phase)):
        progress.enter(phase, batch)
        found |= zip(batch.row_ids.tolist(), read(batch).tolist(), strict=True)
    return _in_order(found, trainer)


def _in_order(found: dict[int, Any], trainer: PpoTrainer) -> list[Any]:
    """All ranks' rows by their number."""
    merged = {row: values for part in gather_objects(found, trainer.layout) for row, values in part.items()}
    return [merged[row] for row in sorted(merged)]


def score_rows(
    held_out: HeldOut,
    models: Mapping[str, Any],
    function: RewardFunction | None,
    trainer: PpoTrainer,
    config: AuditConfig,
) -> list[list[float]]:
    """Of each row its score, or those of the chosen and of the rejected response, as the run would score them."""
    rows, key, phase = held_out.as_scored, held_out.key, f"scoring {held_out.key}"
    scores = FileScores(config, models, function, rows, trainer.layout, trainer.progress, key=key, phase=phase)
    return _in_order({row: values for part in scores.read() for row, values in part.items()}, trainer)


def group_views(held_out: HeldOut, trainer: PpoTrainer, config: AuditConfig) -> list[list[int]]:
    """Of each row its groups: first the one that it is in, the likeliest in the mean of what is read of it; then the
    likeliest in each reading, of which there are two but for a response (audit.group_by=rows) or a known group."""
    grouping, rows = trainer.grouping, held_out.rows
    if not grouping.learns:
        names = trainer.prompts.dataset.group_names
        return [[names.index(rows.group_names[i])] for i in rows.known_groups(range(len(rows)))]
    engine = trainer.models.classifier or trainer.models.critic
    assert engine is not None, "a classifier has a model"

    def read(batch: Any) -> Tensor:
        return grouping.probs(batch, engine.evaluate(batch))

    if config.audit.group_by == "policy":
        each = [_read_answers(held_out, read, trainer, view) for view in range(NUM_VIEWS)]
        found = list(zip(*each, strict=True))
    else:
        probs = read_all(rows, read, trainer, f"grouping {held_out.key}")
        found = [(p,) if isinstance(rows, TrustedDataset) else tuple(p) for p in probs]
    return [[likeliest([sum(p) for p in zip(*views, strict=True)]), *map(likeliest, views)] for views in found]


def _read_answers(held_out: HeldOut, read: Read, trainer: PpoTrainer, view: int) -> list[Any]:
    """What `read` gives of the policy's response number `view` to each row's prompt, on every rank."""
    prompts, found = held_out.prompts, dict[int, Any]()
    for batch in PromptSource(prompts, None, trainer.layout, len(prompts)).all_batches():
        own = replace(batch, sample_ids=batch.sample_ids + view * len(prompts))
        rollout = trainer.sample(own, f"grouping {held_out.key}: rollout")
        if len(rollout.tokens):
            found |= zip(rollout.row_ids.tolist(), read(rollout).tolist(), strict=True)
    return _in_order(found, trainer)


def audited_pairs(held_out: HeldOut, scores: list[list[float]], groups: list[list[str]]) -> list[AuditedPair]:
    """groups: of each row, as `group_views` has them."""
    found = []
    for row, ((chosen, rejected), (group, *views)) in enumerate(zip(scores, groups, strict=True)):
        numbers: Any = {"score_chosen": chosen, "score_rejected": rejected}
        pair = ScoredPair(**held_out.rows.fields(row), **numbers, group=group, source=held_out.key)
        found.append(AuditedPair(pair=pair, views=tuple(views)))
    return found


def audited_trusted(held_out: HeldOut, scores: list[list[float]], groups: list[list[str]]) -> list[TrustedRow]:
    found = []
    for row, ((score,), (group, *views)) in enumerate(zip(scores, groups, strict=True)):
        fields: dict[str, Any] = dict(held_out.rows.fields(row))
        wanted = {name: fields[name] for name in ("prompt", "response", "trusted")}  # not its messages
        found.append(TrustedRow(**wanted, score=score, group=group, views=tuple(views)))
    return found
