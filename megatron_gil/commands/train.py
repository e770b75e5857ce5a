"""What the training commands do: check everything, take the run directory, build the models, resume or start."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from megatron_gil.commands.audit import audit
from megatron_gil.commands.ppo import make_ppo_trainer
from megatron_gil.commands.respond import evaluate_reward, generate, score
from megatron_gil.config import (
    BatchPlan,
    ConfigError,
    DpoConfig,
    PpoConfig,
    RewardConfig,
    SftConfig,
    TrainConfig,
    data_parallel_size,
)
from megatron_gil.engine.checkpoint import CheckpointError, CheckpointStore
from megatron_gil.parallel.collectives import agree, barrier, broadcast_object
from megatron_gil.parallel.layout import ParallelLayout, StartError, read_world_size, start_parallel, stop_parallel
from megatron_gil.parallel.watchdog import Watchdog
from megatron_gil.training.build import build_models, trained
from megatron_gil.training.check_run import CheckedRun, check_run, count_updates
from megatron_gil.training.row_source import RowSource
from megatron_gil.training.run.directory import RunDirectory
from megatron_gil.training.run.download import pin_names
from megatron_gil.training.run.first_lines import first_rows, print_rows
from megatron_gil.training.run.loop import RunFailed, Trainer, TrainingLoop
from megatron_gil.training.run.out_of_memory import explain_out_of_memory, is_out_of_memory
from megatron_gil.training.run.progress import Progress
from megatron_gil.training.run.signals import EXIT_STOPPED, StopRequested, StopSignal
from megatron_gil.training.run.take import take_run_directory
from megatron_gil.training.supervised.objectives import (
    Objective,
    dpo_objective,
    fill_ref_log_probs,
    reward_objective,
    sft_objective,
)
from megatron_gil.training.supervised.reward import RewardTrainer
from megatron_gil.training.supervised.trainer import SupervisedTrainer


def run_command(name: str, config: Any, stop: StopSignal) -> int:
    """Run a configured command on this rank; the exit code."""
    stop.limit(config.run.max_minutes)
    world_size = read_world_size()  # a wrong size is refused before any process group is formed
    if isinstance(config, TrainConfig):
        BatchPlan.of(world_size, config.parallel, config.batch)
    else:
        data_parallel_size(world_size, config.parallel)  # the others take batches of any size
    progress = Progress(stop)
    try:
        with Watchdog(lambda: progress.where, timeout_s=config.parallel.timeout_s) as watchdog, progress.at_end:
            layout = start_parallel(
                config.parallel, seed=config.run.seed, deterministic=config.run.deterministic, joined=watchdog.join
            )
            watchdog.collectives_raise = layout.device.type == "cpu"
            progress.attend(layout)
            code, text = _run_guarded(name, config, layout, progress, watchdog)
    except StartError as error:
        print(f"megatron-gil {name}: {error}", file=sys.stderr)
        return 1
    except ConfigError:  # found by all ranks alike
        stop_parallel()
        raise
    if text and layout.is_main:
        print(f"megatron-gil {name}: {text}", file=sys.stderr)
    stop_parallel()
    return code


def _run_guarded(
    name: str, config: Any, layout: ParallelLayout, progress: Progress, watchdog: Watchdog
) -> tuple[int, str]:
    """(exit code, the line that rank 0 prints). An exception that is not handled here ends with a traceback and code
    1."""
    answers: dict[str, Callable[..., int]] = {
        "generate": generate,
        "score": score,
        "evaluate-reward": evaluate_reward,
        "audit": audit,
    }
    try:
        progress.safe_point("checking the data")
        code = answers.get(name, train)(pin_names(config, layout, progress), layout, progress)
        barrier(layout)  # a rank that leaves early may take the store with it
        return code, ""
    except StopRequested as stopped:
        return EXIT_STOPPED, f"{stopped} in {progress.where.phase}, with nothing to save; start again to go on"
    except (RunFailed, CheckpointError) as error:
        return 1, str(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        text = f"rank {layout.rank}: {explain_out_of_memory(error, progress, config)}"
        print(f"megatron-gil {name}: {text}", file=sys.stderr)
        watchdog.failed(text)
        return 1, ""


def train(config: TrainConfig, layout: ParallelLayout, progress: Progress) -> int:
    """The exit code of a training command."""
    checked = agree(layout, lambda: check_run(config, layout.world_size))
    taken = take_run_directory(config, layout, progress)
    models = build_models(config, checked, layout, progress)
    trainer = make_trainer(config, checked, models, layout, progress)
    directory = Path(config.run.dir)
    length = _length(config, trainer.num_iterations)
    print_rows(first_rows(config, layout, where=directory, models=models, checked=checked, length=length), layout)
    store = CheckpointStore(
        directory / "checkpoints", layout, config.checkpoint, tokenizer_dir=checked.tokenizers.directory
    )
    loop = TrainingLoop(
        trainer,
        config,
        models=trained(models),
        layout=layout,
        directory=directory,
        checkpoints=store,
        progress=progress,
    )
    loop.resume()
    if not loop.is_finished:
        _record_changes(taken, loop.iteration, layout)
    return loop.run()


def make_trainer(
    config: TrainConfig,
    checked: CheckedRun,
    models: Mapping[str, Any],
    layout: ParallelLayout,
    progress: Progress,
) -> Trainer:
    """models: by role, as `model_uses` lists them."""
    match config:
        case PpoConfig():
            return make_ppo_trainer(config, checked, models, layout, progress)
        case SftConfig():
            return _supervised("policy", models, sft_objective(), config, checked, layout, progress)
        case RewardConfig():
            objective = reward_objective(config.reward)
            return _supervised("reward_model", models, objective, config, checked, layout, progress, kind=RewardTrainer)
        case DpoConfig():
            prepare = partial(fill_ref_log_probs, ref_policy=models["ref_policy"])
            objective = dpo_objective(config.dpo)
            return _supervised("policy", models, objective, config, checked, layout, progress, prepare=prepare)
    raise AssertionError(f"no trainer is known for {type(config).__name__}")


def _supervised(
    role: str,
    models: Mapping[str, Any],
    objective: Objective,
    config: SftConfig | RewardConfig | DpoConfig,
    checked: CheckedRun,
    layout: ParallelLayout,
    progress: Progress,
    *,
    kind: type[SupervisedTrainer] = SupervisedTrainer,
    **kwargs: Any,
) -> SupervisedTrainer:
    held_out = checked.held_out
    return kind(
        role,
        models[role],
        objective,
        optimizer=config.optimizer,
        rows=RowSource.shuffled(checked.train, config, layout),
        eval_rows=None if held_out is None else RowSource(held_out, None, layout, config.batch.micro_size),
        num_iterations=count_updates(config, len(checked.train)),
        progress=progress,
        tokenizer=checked.tokenizers.tokenizer,
        **kwargs,
    )


def _length(config: TrainConfig, num_iterations: int) -> str:
    """How much there is to do."""
    if isinstance(config, PpoConfig):
        responses = f" x {config.ppo.responses_per_prompt} responses" * (config.ppo.responses_per_prompt > 1)
        return f"{num_iterations:,} iterations of {config.ppo.prompts} prompts{responses}"
    return f"{num_iterations:,} updates of {config.batch.global_size} rows"


def _record_changes(taken: RunDirectory | None, iteration: int, layout: ParallelLayout) -> None:
    error = ""
    if taken is not None:
        try:
            taken.record(iteration)
        except OSError as refused:
            error = f"{taken.path}: the new settings cannot be written: {refused.strerror}"
    if error := broadcast_object(error, layout):
        raise RunFailed(error)
