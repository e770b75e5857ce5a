"""The loop that every training command runs: iterate, log, save, evaluate, stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from megatron_gil.config import TrainConfig
from megatron_gil.engine.checkpoint import CheckpointStore
from megatron_gil.engine.megatron import TrainableModel
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.training.metrics import RunLog
from megatron_gil.training.signals import EXIT_STOPPED, StopRequested, StopSignal
from megatron_gil.types import Metrics


class RunFailed(RuntimeError):
    """The run cannot go on; one line says why. Exit code 1."""


class Trainer(Protocol):
    """One method of training. Its state is in `models()` and `state()`; all else follows from the iteration."""

    num_iterations: int
    line: tuple[str, ...]
    """Metrics of the console line."""

    def iterate(self, iteration: int) -> Metrics: ...

    def evaluate(self) -> Metrics:
        """On held-out data; empty where there is none."""
        ...

    def samples(self, count: int) -> list[dict[str, Any]]:
        """Rows of the last iteration that a person can read, on rank 0."""
        ...

    def models(self) -> dict[str, TrainableModel]: ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


def run_loop(
    trainer: Trainer,
    config: TrainConfig,
    *,
    layout: ParallelLayout,
    directory: Path,
    checkpoints: CheckpointStore,
    stop: StopSignal,
    start: int,
) -> int:
    """Train from iteration `start`; the exit code. A stop before an iteration's updates discards that iteration."""
    log = RunLog(
        directory if layout.is_main else None,
        num_iterations=trainer.num_iterations,
        start=start,
        tensorboard=config.log.tensorboard,
        line=trainer.line,
    )
    num_skipped, saved = 0, start
    iteration = start
    try:
        while iteration < trainer.num_iterations:
            stop.safe_point(layout)
            metrics = dict(trainer.iterate(iteration))
            iteration += 1
            num_skipped += _report_skipped(trainer, log, iteration)
            last = iteration == trainer.num_iterations
            if last or (config.log.eval_every and iteration % config.log.eval_every == 0):
                metrics |= trainer.evaluate()
            due = last or bool(config.log.samples_every and iteration % config.log.samples_every == 0)
            log.iteration(iteration - 1, metrics, trainer.samples(config.log.samples) if due and layout.is_main else [])
            if num_skipped > config.run.max_skipped_updates:
                raise RunFailed(
                    f"{num_skipped} updates were skipped for NaN or Inf, more than run.max_skipped_updates="
                    f"{config.run.max_skipped_updates}; lower the learning rate or see the lines above"
                )
            if last or iteration % config.checkpoint.every == 0:
                checkpoints.save(iteration, trainer.models(), trainer.state())
                saved = iteration
        return 0
    except StopRequested:
        if saved != iteration or iteration == 0:
            checkpoints.save(iteration, trainer.models(), trainer.state())
        log.note(f"stopped by {stop.reason or 'another rank'} after saving iteration {iteration}; start again to go on")
        return EXIT_STOPPED
    finally:
        log.close()


def _report_skipped(trainer: Trainer, log: RunLog, iteration: int) -> int:
    """Say what stopped each skipped update of this iteration; how many there were."""
    count = 0
    for name, model in trainer.models().items():
        for skipped in model.take_skipped():
            count += 1
            log.note(f"iteration {iteration}: update of {name} skipped: {skipped}")
    return count
