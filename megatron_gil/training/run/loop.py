"""The loop that every training command runs: iterate, evaluate, log, save, stop."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_gil.config import ConfigError, PpoConfig, TrainConfig
from megatron_gil.engine.checkpoint import CheckpointError, CheckpointStore
from megatron_gil.engine.megatron import TrainableModel
from megatron_gil.parallel.collectives import broadcast_object
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.training.run.best import Best, find_best
from megatron_gil.training.run.boards import BoardError
from megatron_gil.training.run.metrics import RunLog
from megatron_gil.training.run.progress import Progress
from megatron_gil.training.run.signals import EXIT_STOPPED, StopRequested
from megatron_gil.types import Metrics


class RunFailed(RuntimeError):
    """The run cannot go on; one line says why. Exit code 1."""


class Trainer(Protocol):
    """One method of training. Its state is in its models and `state()`; all else follows from the iteration."""

    num_iterations: int
    line: tuple[str, ...]
    """Metrics of the console line."""

    def iterate(self, iteration: int) -> Metrics: ...

    def evaluate(self) -> Metrics:
        """On held-out data; empty where there is none."""
        ...

    def samples(self, count: int) -> list[dict[str, Any]]:
        """Rows of the last iteration that a person can read. Collective; rank 0's are written."""
        ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...

    def extra_config(self) -> dict[str, dict[str, Any]]:
        """What the config.json of a model says beside its sizes, by role."""
        ...

    def take_warnings(self) -> list[str]:
        """Lines for the person who watches, since the last call."""
        ...


@dataclass(slots=True, kw_only=True)
class LoopState:
    """What a checkpoint holds of the loop itself."""

    iteration: int = 0
    """Whole iterations so far."""
    num_skipped: int = 0
    """Updates skipped for NaN or Inf."""
    unlogged: dict[str, float] | None = None
    """Metrics of the last iteration, where a stop came before its evaluation had ended."""
    best: Best | None = None
    """By checkpoint.keep_best."""

    @classmethod
    def read(cls, content: dict[str, Any]) -> LoopState:
        best = content.get("best")  # absent before there was keep_best
        return cls(**{**content, "best": best and Best(**best)})


def skipped_updates(models: Mapping[str, TrainableModel]) -> list[str]:
    """What stopped each update that was skipped since the last call, a line each."""
    return [f"update of {name} skipped: {why}" for name, model in models.items() for why in model.take_skipped()]


class TrainingLoop:
    """Trains from the newest checkpoint to the last iteration."""

    def __init__(
        self,
        trainer: Trainer,
        config: TrainConfig,
        *,
        models: dict[str, TrainableModel],
        layout: ParallelLayout,
        directory: Path,
        checkpoints: CheckpointStore,
        progress: Progress,
    ) -> None:
        self._trainer, self._config, self._layout, self._progress = trainer, config, layout, progress
        self._models, self._directory, self._checkpoints = models, directory, checkpoints
        self._state = LoopState()
        self._saved: int | None = None  # iteration of the newest checkpoint, written or being written
        self._best_before: Best | None = None  # the one before the last evaluation

    def resume(self) -> None:
        """Go to the newest good checkpoint; to the start where there is none."""
        self._progress.safe_point("looking for a checkpoint")
        found = self._checkpoints.find(note=lambda text: print(text, file=sys.stderr))
        if found is None:
            return
        self._progress.safe_point("loading a checkpoint")
        loaded = self._checkpoints.load(found, self._models)
        self._trainer.load_state(loaded.state["trainer"])
        self._state = LoopState.read(loaded.state["loop"])
        self._saved = loaded.iteration
        if self._layout.is_main:
            print(self._resume_line(loaded.iteration, self._trainer.num_iterations), file=sys.stderr)

    def _resume_line(self, done: int, wanted: int) -> str:
        if done < wanted or self._state.unlogged is not None:
            return f"resuming {self._directory} at iteration {done} of {wanted}"
        if done == wanted:
            return f"{self._directory} is finished: it has all {wanted} iterations; nothing to do"
        keys = "ppo.iterations" if isinstance(self._config, PpoConfig) else "train.updates or train.epochs"
        return (
            f"{self._directory} has {done} iterations already, more than the {wanted} that {keys} asks for; nothing to "
            "do: ask for more, or choose another run.dir"
        )

    @property
    def iteration(self) -> int:
        """Whole iterations so far."""
        return self._state.iteration

    @property
    def is_finished(self) -> bool:
        return self._state.iteration >= self._trainer.num_iterations and self._state.unlogged is None

    def run(self) -> int:
        """The exit code. A stop before an iteration's updates discards that iteration."""
        if self.is_finished:
            return 0
        self._log, code = self._open_log(), 1
        try:
            code = self._run()
            return code
        finally:
            self._log.close(code)

    def _run(self) -> int:
        state, last = self._state, self._trainer.num_iterations
        try:
            if state.unlogged is not None:
                self._finish_iteration(state.unlogged)
            while state.iteration < last:
                self._progress.safe_point(f"beginning iteration {state.iteration + 1}")
                self._finish_save(wait=False)
                self._iterate()
            self._finish_save(wait=True)
            if self._saved != last:
                raise RunFailed(f"the last iteration, {last}, could not be saved; make room, then start again")
            return 0
        except StopRequested as stopped:
            phase = self._progress.where.phase
            stopped.with_traceback(None)  # whose frames hold the memory of what was stopped
            self._finish_save(wait=True)
            if self._saved != state.iteration:
                self._save()
                self._finish_save(wait=True)
            if self._saved != state.iteration:
                raise RunFailed(f"{stopped} in {phase}, but iteration {state.iteration} could not be saved") from None
            self._log.note(f"{stopped} in {phase}; iteration {state.iteration} is saved, start again to go on")
            return EXIT_STOPPED

    def _open_log(self) -> RunLog:
        log, error = None, ""
        try:
            log = RunLog(
                self._directory if self._layout.is_main else None,
                config=self._config,
                num_iterations=self._trainer.num_iterations,
                start=self._state.iteration - (self._state.unlogged is not None),
                line=self._trainer.line,
            )
        except OSError as refused:
            error = f"{self._directory} cannot be written: {refused}"
        except (ConfigError, BoardError) as refused:  # on the main rank alone, so it is told to all below
            error = str(refused)
        if error := broadcast_object(error, self._layout):
            raise RunFailed(error)
        assert log is not None
        return log

    def _iterate(self) -> None:
        state, trainer, log = self._state, self._trainer, self._config.log
        metrics = dict(trainer.iterate(state.iteration))
        state.iteration += 1
        skipped = skipped_updates(self._models)
        state.num_skipped += len(skipped)
        for text in (*skipped, *trainer.take_warnings()):
            self._log.note(f"iteration {state.iteration}: {text}")
        state.unlogged = metrics
        last = state.iteration == trainer.num_iterations
        if last or (log.samples_every and state.iteration % log.samples_every == 0):
            self._log.samples(state.iteration - 1, trainer.samples(log.samples))
        self._finish_iteration(metrics)

    def _finish_iteration(self, metrics: Metrics) -> None:
        """Evaluate, log and save where it is time to."""
        state, config, limit = self._state, self._config, self._config.run.max_skipped_updates
        last = state.iteration == self._trainer.num_iterations
        if last or (config.log.eval_every and state.iteration % config.log.eval_every == 0):
            metrics = {**metrics, **self._trainer.evaluate()}
        self._log.iteration(state.iteration - 1, metrics)
        state.unlogged = None
        is_best = self._take_best(metrics)
        if state.num_skipped > limit:
            raise RunFailed(
                f"{state.num_skipped} updates were skipped for NaN or Inf, more than run.max_skipped_updates={limit}; "
                "lower the learning rate or see the lines above"
            )
        if (last or is_best or state.iteration % config.checkpoint.every == 0) and self._saved != state.iteration:
            self._finish_save(wait=True)
            self._save()

    def _take_best(self, metrics: Metrics) -> bool:
        """Whether this iteration is the best so far; said, and remembered."""
        state, before = self._state, self._state.best
        state.best = find_best(metrics, state.iteration, self._config.checkpoint.keep_best, before)
        if state.best is None or state.best == before:
            return False
        self._best_before = before
        text = (
            f"{state.best.metric.removeprefix('-')} {state.best.value:.4g} is the best so far: kept as checkpoints/best"
        )
        self._log.note(f"iteration {state.iteration}: {text}")
        if self._saved == state.iteration:  # by a stop that came before the evaluation
            self._checkpoints.mark_best(state.iteration)
        return True

    def _save(self) -> None:
        """Begin a checkpoint, which never gets ahead of metrics.jsonl."""
        self._progress.enter("saving")
        content = {"trainer": self._trainer.state(), "loop": asdict(self._state)}
        try:
            if reason := broadcast_object(self._log.sync(), self._layout):
                raise CheckpointError(f"iteration {self._state.iteration} cannot be saved: {reason}")
            self._saved, best = self._state.iteration, self._state.best and self._state.best.iteration
            self._checkpoints.begin(
                self._state.iteration,
                self._models,
                content,
                best=best,
                extra_config=self._trainer.extra_config(),
                note=self._log.note,
            )
        except CheckpointError as error:
            self._save_failed(error)
        if not self._checkpoints.background:
            self._finish_save(wait=True)

    def _finish_save(self, *, wait: bool) -> None:
        """Complete the checkpoint that was begun, if its files are written or `wait` asks to wait for them."""
        if wait:
            self._progress.enter("saving")
        try:
            self._checkpoints.finish(wait=wait)
        except CheckpointError as error:
            self._save_failed(error)

    def _save_failed(self, error: CheckpointError) -> None:
        if self._best_before is not None and self._best_before.iteration == self._saved:
            self._best_before = None
        if self._state.best is not None and self._state.best.iteration == self._saved:
            self._state.best = self._best_before  # whose checkpoint is still there
        self._saved = None
        if self._config.checkpoint.on_error == "stop":
            raise RunFailed(f"{error}; older checkpoints are untouched. Make room, then start again")
        self._log.note(f"{error}; older checkpoints are untouched, the run goes on")
