"""`megatron-gil audit`: before a PPO-GIL run, its groups, and whether the reward can be trusted in each."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from megatron_gil.commands.ppo import make_ppo_trainer
from megatron_gil.commands.win_rates import print_table
from megatron_gil.config import AuditConfig
from megatron_gil.engine.files import reason
from megatron_gil.evaluation.audit.measure import Audit, audit_rows
from megatron_gil.evaluation.audit.page import audit_page
from megatron_gil.evaluation.audit.rows import AuditedRows
from megatron_gil.evaluation.audit.tables import groups_table, reach_table, title
from megatron_gil.evaluation.tables import finite
from megatron_gil.parallel.collectives import agree, broadcast_object
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.paths import write_new
from megatron_gil.training.audit.length import at_rest, audit_length
from megatron_gil.training.audit.readings import audited_pairs, audited_trusted, group_views, score_rows
from megatron_gil.training.audit.rest import measured_responses, train_classifier
from megatron_gil.training.build import build_models, trained
from megatron_gil.training.check_run import CheckedRun, check_run
from megatron_gil.training.ppo.iteration import PpoTrainer
from megatron_gil.training.run.first_lines import first_rows, print_rows
from megatron_gil.training.run.loop import RunFailed
from megatron_gil.training.run.output import AuditFiles, audit_files
from megatron_gil.training.run.progress import Progress
from megatron_gil.training.run.signals import EXIT_STOPPED, StopRequested
from megatron_gil.training.run.take import take_output
from megatron_gil.types import Metrics

NUM_WORDS = 6
"""Of each group, on the console."""


def audit(config: AuditConfig, layout: ParallelLayout, progress: Progress) -> int:
    """Exit code 75 where a signal stopped it: nothing is kept then."""
    resting = at_rest(config)
    checked = agree(layout, lambda: check_run(resting, layout.world_size))
    files = agree(layout, lambda: audit_files(config.output))
    take_output(files.numbers, config, layout, progress, check=audit_files)
    try:
        models = build_models(resting, checked, layout, progress)
        trainer = make_ppo_trainer(resting, checked, models, layout, progress)
        length = audit_length(config)
        first = first_rows(config, layout, where=files.numbers, models=models, checked=checked, length=length)
        print_rows(first, layout)
        rows, training = _collect(config, checked, models, trainer)
    except StopRequested as stopped:
        if layout.is_main:
            text = f"{stopped} in {progress.where.phase}; an audit keeps nothing, start it again from the beginning"
            print(f"megatron-gil audit: {text}", file=sys.stderr)
        return EXIT_STOPPED
    progress.enter("evaluating")
    _evaluate(config, rows, training, files, layout)
    return 0


def _collect(
    config: AuditConfig, checked: CheckedRun, models: Mapping[str, Any], trainer: PpoTrainer
) -> tuple[AuditedRows, list[Metrics]]:
    """Scores first: a broken reward shows before the classifier is trained."""
    given = checked.audit
    assert given is not None
    scores = {h.key: score_rows(h, models, checked.function, trainer, config) for h in given.given}
    training = train_classifier(trainer, trained(models), config)
    names = group_names(trainer)
    groups = {h.key: [[names[i] for i in row] for row in group_views(h, trainer, config)] for h in given.given}
    pairs, trusted = given.pairs, given.trusted
    rows = AuditedRows(
        groups=names,
        pairs=tuple(audited_pairs(pairs, scores[pairs.key], groups[pairs.key])) if pairs else (),
        trusted=tuple(audited_trusted(trusted, scores[trusted.key], groups[trusted.key])) if trusted else (),
        responses=tuple(measured_responses(trainer, config)),
    )
    return rows, training


def group_names(trainer: PpoTrainer) -> tuple[str, ...]:
    """The labels of known groups; numbers of learned ones."""
    if not trainer.grouping.learns:
        return trainer.prompts.dataset.group_names
    return tuple(f"group {i}" for i in range(trainer.grouping.num_groups))


def _evaluate(
    config: AuditConfig, rows: AuditedRows, training: Sequence[Metrics], files: AuditFiles, layout: ParallelLayout
) -> None:
    """On rank 0: measure, print and write. RunFailed where nothing could be written."""

    def evaluate() -> str:
        try:
            if layout.is_main:
                found = audit_rows(rows, min_group_mass=config.gil.min_group_mass)
                show(found)
                write(found, rows, training, config, files)
        except OSError as refused:
            return f"{files.numbers} cannot be written: {reason(refused)}; make room, then start again"
        return ""

    if error := broadcast_object(agree(layout, evaluate), layout):
        raise RunFailed(error)


def show(found: Audit) -> None:
    console = Console(highlight=False)
    print_table(console, groups_table(found, narrow=True))
    if found.reach is not None:
        print_table(console, reach_table(found.reach, narrow=True))
    for group in found.groups:
        words = ", ".join(word.word for word in group.words[:NUM_WORDS])
        console.print(f"{title(group.name, found)}, typical words: {words or 'none'}", markup=False)
    console.print(f"\n{found.advice.line}", markup=False)


def write(found: Audit, rows: AuditedRows, training: Sequence[Metrics], config: AuditConfig, files: AuditFiles) -> None:
    """Raises OSError where the files cannot be written; none of them is there then."""
    numbers = {**asdict(found), "training": training, "config": asdict(config)}
    write_new(
        {
            files.page: audit_page(found, rows, training, name=files.numbers.stem),
            files.numbers: json.dumps(finite(numbers), indent=2) + "\n",
        }
    )
    print(f"written: {files.page}, {files.numbers}", file=sys.stderr)
