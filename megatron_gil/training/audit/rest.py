"""The groups of a planned run, found while its policy waits: the trainer's own iterations, warm-up for ever."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

import torch

from megatron_gil.config import AuditConfig
from megatron_gil.engine.megatron import TrainableModel
from megatron_gil.evaluation.audit.rows import SampledResponse
from megatron_gil.parallel.collectives import gather_objects
from megatron_gil.training.audit.length import num_measured_rollouts, num_training_iterations
from megatron_gil.training.file_scores import scored_by
from megatron_gil.training.ppo.iteration import PpoTrainer
from megatron_gil.training.run.loop import RunFailed, skipped_updates
from megatron_gil.training.run.metrics import clock_text
from megatron_gil.training.run.samples import sample_texts
from megatron_gil.types import Metrics

NUM_LINES = 10
"""Of progress, at most twice as many."""


def train_classifier(trainer: PpoTrainer, models: Mapping[str, TrainableModel], config: AuditConfig) -> list[Metrics]:
    """The metrics of each iteration. RunFailed where more than run.max_skipped_updates updates are skipped for NaN or
    Inf. models: that are trained, by role."""
    found: list[Metrics] = []
    last, started, num_skipped = num_training_iterations(config), time.monotonic(), 0
    for iteration in range(last):
        trainer.progress.safe_point(f"beginning iteration {iteration + 1}")
        found.append(trainer.iterate(iteration))
        _check_scores(trainer, config)
        skipped, done = skipped_updates(models), iteration + 1
        num_skipped += len(skipped)
        lines = [f"iteration {done}: {text}" for text in (*skipped, *trainer.take_warnings())]
        if done % max(1, last // NUM_LINES) == 0 or done == last:
            left = (time.monotonic() - started) / done * (last - done)
            lines.append(_line(done, last, found[-1], left))
        if trainer.layout.is_main:
            print("".join(f"{line}\n" for line in lines), end="", file=sys.stderr, flush=True)
        if num_skipped > (limit := config.run.max_skipped_updates):
            raise RunFailed(
                f"{num_skipped} updates were skipped for NaN or Inf, more than run.max_skipped_updates={limit}; lower "
                "critic_optimizer.lr or see the lines above; no output is written"
            )
    return found


def measured_responses(trainer: PpoTrainer, config: AuditConfig) -> list[SampledResponse]:
    """Responses of the policy with what reward and classifier say of them now, over all ranks and on every
    rank; the same for any layout but for rounding."""
    prompts, first = trainer.prompts.dataset, num_training_iterations(config)
    found: dict[int, SampledResponse] = {}
    for number in range(num_measured_rollouts(config)):
        rollout = trainer.sample(trainer.prompts.batch(first + number), "measuring: rollout")
        scores = trainer.score(rollout)
        trainer.last_rollout, trainer.last_scores = rollout, scores
        _check_scores(trainer, config)
        tokens = (rollout.lengths - rollout.prompt_lengths).tolist()
        labels = [prompts.group_names[i] if i >= 0 else None for i in rollout.known_groups.tolist()]
        texts = sample_texts(rollout, trainer.tokenizer)
        columns = (rollout.sample_ids.tolist(), texts, scores.scores.tolist(), scores.group_probs.tolist())
        for sample_id, text, score, probs, count, label in zip(*columns, tokens, labels, strict=True):
            found[sample_id] = SampledResponse(**text, score=score, probs=tuple(probs), num_tokens=count, label=label)
    merged = {key: row for part in gather_objects(found, trainer.layout) for key, row in part.items()}
    return [merged[key] for key in sorted(merged)]


def _check_scores(trainer: PpoTrainer, config: AuditConfig) -> None:
    """RunFailed for a NaN: it means a broken model, and there is no group for it."""
    bad = int((~torch.isfinite(trainer.last_scores.scores)).sum())
    if num_bad := sum(gather_objects(bad * trainer.layout.speaks_for_copy, trainer.layout)):
        raise RunFailed(f"{scored_by(config)} gives {num_bad} of the policy's responses no score; no output is written")


def _line(done: int, last: int, metrics: Metrics, left: float) -> str:
    """In at most 80 columns for two groups."""
    masses = [value for name, value in metrics.items() if name.startswith("group/mass_")]
    numbers = {
        "score": f"{metrics['reward/score_mean']:.3g}",
        "masses": " ".join(f"{mass:.2f}" for mass in masses),
        "variance": f"{metrics['group/return_variance']:.3g}",
        "information": f"{metrics['group/information']:.2f}",
    }
    shown = "  ".join(f"{name} {text}" for name, text in numbers.items())
    return f"{done:>{len(str(last))}}/{last}  {shown}  left {clock_text(left)}"
