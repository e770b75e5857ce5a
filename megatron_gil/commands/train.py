"""What the training commands do: check everything, take the run directory, build the models, resume or start."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_gil.commands.respond import generate, score
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
from megatron_gil.data.rows.demonstrations import DemonstrationDataset, TextDataset
from megatron_gil.data.rows.order import RowOrder
from megatron_gil.data.rows.preferences import PreferenceDataset
from megatron_gil.data.rows.prompts import PromptDataset
from megatron_gil.engine.checkpoint import CheckpointError, CheckpointStore
from megatron_gil.engine.generation import Generator
from megatron_gil.engine.megatron import MegatronModel, TrainableModel
from megatron_gil.engine.protocol import LossFn
from megatron_gil.parallel.collectives import agree, all_sum, barrier, broadcast_object
from megatron_gil.parallel.layout import ParallelLayout, StartError, read_world_size, start_parallel, stop_parallel
from megatron_gil.parallel.watchdog import Watchdog
from megatron_gil.training.build import (
    build_frozen,
    build_trainable,
    model_path,
    start_group_head,
    start_score_head,
)
from megatron_gil.training.checks import (
    check_models,
    limits,
    read_train_and_eval,
    require,
    take_run_directory,
)
from megatron_gil.training.ppo.alarms import Range
from megatron_gil.training.ppo.checks import check_rollout
from megatron_gil.training.ppo.grouping import Grouping, KnownGroups, LearnedGroups, SingleGroup
from megatron_gil.training.ppo.iteration import PpoTrainer
from megatron_gil.training.ppo.reward_text import RewardText
from megatron_gil.training.row_source import PromptSource, RowSource
from megatron_gil.training.run.directory import RunDirectory
from megatron_gil.training.run.first_lines import FirstRow, first_rows, print_rows
from megatron_gil.training.run.loop import RunFailed, Trainer, TrainingLoop
from megatron_gil.training.run.out_of_memory import explain_out_of_memory, is_out_of_memory
from megatron_gil.training.run.progress import Progress
from megatron_gil.training.run.signals import EXIT_STOPPED, StopRequested, StopSignal
from megatron_gil.training.supervised.reward import RewardTrainer, read_score_range
from megatron_gil.training.supervised.trainer import (
    REWARD_NUMBERS,
    SFT_NUMBERS,
    SupervisedTrainer,
    dpo_loss_fn,
    dpo_numbers,
    fill_ref_log_probs,
    reward_loss_fn,
    sft_loss,
)
from megatron_gil.training.tokenizers import RunTokenizers


def run_command(name: str, config: Any, stop: StopSignal) -> int:
    """Run a configured command on this rank; the exit code."""
    stop.limit(config.run.max_minutes)
    world_size = read_world_size()  # looked at before any process group is formed
    if isinstance(config, TrainConfig):
        BatchPlan.of(world_size, config.parallel, config.batch)
    else:
        data_parallel_size(world_size, config.parallel)  # answers and scores come in batches of any size
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
    """(exit code, what rank 0 says of it). Whatever is not foreseen here ends with a traceback and code 1."""
    commands: dict[str, Callable[..., int]] = {
        "sft": _sft,
        "reward": _reward,
        "dpo": _dpo,
        "ppo": _ppo,
        "generate": generate,
        "score": score,
    }
    try:
        progress.safe_point("checking the data")
        code = commands[name](config, layout, progress)
        barrier(layout)  # nobody goes while another still needs the store
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


def _sft(config: SftConfig, layout: ParallelLayout, progress: Progress) -> int:
    train, held_out, tokenizers, directory = _read_rows("sft", config, layout, progress, DemonstrationDataset)
    progress.safe_point("building policy")
    policy, _ = build_trainable(config, "policy", "lm", layout, config.optimizer)
    trainer = _supervised(
        "policy",
        policy,
        sft_loss,
        config,
        layout,
        train,
        held_out,
        ("sft/loss",),
        progress=progress,
        tokenizer=tokenizers.tokenizer,
        numbers=SFT_NUMBERS,
    )
    rows = _first_rows(config, layout, {"policy": policy}, train, held_out, trainer, tokenizers)
    return _train(trainer, config, layout, progress, tokenizers.directory, directory, rows)


def _reward(config: RewardConfig, layout: ParallelLayout, progress: Progress) -> int:
    train, held_out, tokenizers, directory = _read_rows("reward", config, layout, progress, PreferenceDataset)
    progress.safe_point("building reward_model")
    model, absent = build_trainable(config, "reward_model", "score", layout, config.optimizer)
    if absent:
        start_score_head(model, config.run.seed)
    line = ("reward/loss", "reward/accuracy")
    loss = reward_loss_fn(config.reward)
    trainer = _supervised(
        "reward_model",
        model,
        loss,
        config,
        layout,
        train,
        held_out,
        line,
        kind=RewardTrainer,
        progress=progress,
        tokenizer=tokenizers.tokenizer,
        numbers=REWARD_NUMBERS,
    )
    rows = _first_rows(config, layout, {"reward_model": model}, train, held_out, trainer, tokenizers)
    return _train(trainer, config, layout, progress, tokenizers.directory, directory, rows)


def _dpo(config: DpoConfig, layout: ParallelLayout, progress: Progress) -> int:
    train, held_out, tokenizers, directory = _read_rows("dpo", config, layout, progress, PreferenceDataset)
    progress.safe_point("building policy")
    policy, _ = build_trainable(config, "policy", "lm", layout, config.optimizer)
    progress.safe_point("building ref_policy")
    ref_policy = build_frozen(config, "ref_policy", "lm", layout)
    trainer = _supervised(
        "policy",
        policy,
        dpo_loss_fn(config.dpo),
        config,
        layout,
        train,
        held_out,
        ("dpo/loss", "dpo/accuracy", "dpo/margin"),
        progress=progress,
        tokenizer=tokenizers.tokenizer,
        numbers=dpo_numbers(config.dpo),
        prepare=lambda batch: fill_ref_log_probs(batch, ref_policy),
    )
    rows = _first_rows(
        config, layout, {"policy": policy, "ref_policy": ref_policy}, train, held_out, trainer, tokenizers
    )
    return _train(trainer, config, layout, progress, tokenizers.directory, directory, rows)


def _ppo(config: PpoConfig, layout: ParallelLayout, progress: Progress) -> int:
    def check() -> tuple[PromptDataset, PromptDataset | None, TextDataset | None, RunTokenizers, Range | None]:
        tokenizers = check_models("ppo", config)
        tokenizer = tokenizers.tokenizer
        train, held_out = read_train_and_eval(
            config, PromptDataset, tokenizer, max_prompt_tokens=config.data.max_prompt_tokens
        )
        pretrain = None
        if config.ppo.ptx_coef:
            path = require(config.data.pretrain, "data.pretrain", "ppo.ptx_coef is above 0")
            pretrain = TextDataset(path, tokenizer, **limits(config))
        check_rollout(config, layout.dp_size, train)
        return train, held_out, pretrain, tokenizers, read_score_range(model_path(config, "reward_model"))

    train, held_out, pretrain, tokenizers, score_range = agree(layout, check)
    tokenizer = tokenizers.tokenizer
    directory = take_run_directory(config, layout, progress)
    gil, sums = config.gil, all_sum(layout)
    grouping: Grouping = SingleGroup(sums)
    if gil.num_groups > 1 or gil.groups == "known":
        known = KnownGroups(gil, len(train.group_names), sums)
        grouping = LearnedGroups(gil, sums) if gil.groups == "learned" else known
    learned = isinstance(grouping, LearnedGroups)
    head_groups = gil.num_groups if learned and gil.classifier == "critic_head" else 0

    progress.safe_point("building policy")
    policy, _ = build_trainable(config, "policy", "lm", layout, config.optimizer)
    critic, classifier = None, None
    if config.ppo.advantages == "gae":
        progress.safe_point("building critic")
        critic, absent = build_trainable(
            config, "critic", "critic", layout, config.critic_optimizer, num_groups=head_groups
        )
        if "group_head.weight" in absent:
            start_group_head(critic, gil, config.run.seed)
    if learned and gil.classifier == "own_model":
        progress.safe_point("building classifier")
        classifier, absent = build_trainable(
            config, "reward_model", "critic", layout, config.critic_optimizer, num_groups=gil.num_groups
        )
        start_group_head(classifier, gil, config.run.seed)
    sampler = Generator(policy, config.sampling, tokenizer=tokenizer, seed=config.run.seed)
    progress.safe_point("building ref_policy")
    ref_policy = build_frozen(config, "ref_policy", "lm", layout)
    progress.safe_point("building reward_model")
    reward_model = build_frozen(config, "reward_model", "score", layout)
    positions = reward_model.spec.max_positions
    trainer = PpoTrainer(
        config,
        policy=policy,
        ref_policy=ref_policy,
        critic=critic,
        reward_model=reward_model,
        classifier=classifier,
        grouping=grouping,
        sampler=sampler,
        prompts=_prompt_source(config, layout, train),
        pretrain=None if pretrain is None else _row_source(config, layout, pretrain),
        tokenizer=tokenizer,
        eval_prompts=None if held_out is None else PromptSource(held_out, None, layout, len(held_out)),
        progress=progress,
        all_sum=sums,
        score_range=score_range,
        reward_text=tokenizers.reward and RewardText(tokenizer, tokenizers.reward, max_tokens=positions),
    )
    models = {**trainer.models(), "ref_policy": ref_policy, "reward_model": reward_model}
    rows = _first_rows(config, layout, models, train, held_out, trainer, tokenizers, pretrain)
    return _train(trainer, config, layout, progress, tokenizers.directory, directory, rows)


def _first_rows(
    config: TrainConfig,
    layout: ParallelLayout,
    models: Mapping[str, MegatronModel],
    train: Any,
    held_out: Any,
    trainer: Trainer,
    tokenizers: RunTokenizers,
    pretrain: Any = None,
) -> list[FirstRow]:
    length = f"{trainer.num_iterations:,} updates of {config.batch.global_size} rows"
    if isinstance(config, PpoConfig):
        replies = f" x {config.ppo.responses_per_prompt} replies" * (config.ppo.responses_per_prompt > 1)
        length = f"{trainer.num_iterations:,} iterations of {config.ppo.prompts} prompts{replies}"
    data = {"data.train": train, "data.eval": held_out, "data.pretrain": pretrain}
    where = Path(config.run.dir)
    return first_rows(config, layout, where=where, models=models, data=data, length=length, notes=tokenizers.notes)


def _read_rows(
    command: str,
    config: SftConfig | RewardConfig | DpoConfig,
    layout: ParallelLayout,
    progress: Progress,
    kind: Callable[..., Any],
) -> tuple[Any, Any, RunTokenizers, RunDirectory | None]:
    """(training rows, held-out rows, tokenizers, the run directory), with everything checked."""

    def check() -> tuple[Any, Any, RunTokenizers]:
        tokenizers = check_models(command, config)
        return *read_train_and_eval(config, kind, tokenizers.tokenizer, **limits(config)), tokenizers

    train, held_out, tokenizers = agree(layout, check)
    return train, held_out, tokenizers, take_run_directory(config, layout, progress)


def _train(
    trainer: Trainer,
    config: TrainConfig,
    layout: ParallelLayout,
    progress: Progress,
    tokenizer_dir: Path,
    taken: RunDirectory | None,
    rows: Sequence[FirstRow],
) -> int:
    """Say what begins; resume from the newest good checkpoint where there is one, then loop."""
    print_rows(rows, layout)
    directory = Path(config.run.dir)
    store = CheckpointStore(directory / "checkpoints", layout, config.checkpoint, tokenizer_dir=tokenizer_dir)
    loop = TrainingLoop(trainer, config, layout=layout, directory=directory, checkpoints=store, progress=progress)
    loop.resume()
    if not loop.is_finished:
        _record_changes(taken, loop.iteration, layout)
    return loop.run()


def _record_changes(taken: RunDirectory | None, iteration: int, layout: ParallelLayout) -> None:
    error = ""
    if taken is not None:
        try:
            taken.record(iteration)
        except OSError as refused:
            error = f"{taken.path}: the new settings cannot be written: {refused.strerror}"
    if error := broadcast_object(error, layout):
        raise RunFailed(error)


def _supervised(
    role: str,
    model: TrainableModel,
    loss_fn: LossFn,
    config: SftConfig | RewardConfig | DpoConfig,
    layout: ParallelLayout,
    train: Any,
    held_out: Any,
    line: tuple[str, ...],
    *,
    kind: type[SupervisedTrainer] = SupervisedTrainer,
    **kwargs: Any,
) -> SupervisedTrainer:
    size = config.batch.global_size
    return kind(
        role,
        model,
        loss_fn,
        optimizer=config.optimizer,
        rows=_row_source(config, layout, train),
        eval_rows=None if held_out is None else RowSource(held_out, None, layout, config.batch.micro_size),
        num_iterations=config.train.updates or max(1, config.train.epochs * len(train) // size),
        all_sum=all_sum(layout),
        line=(*line, f"{role}/gradient_norm", "time/tokens_per_s"),
        **kwargs,
    )


def _row_source(config: TrainConfig, layout: ParallelLayout, dataset: Any) -> RowSource:
    order = RowOrder(
        len(dataset),
        seed=config.run.seed,
        batch_size=config.batch.global_size,
        dp_size=layout.dp_size,
        dp_rank=layout.dp_rank,
    )
    return RowSource(dataset, order, layout, config.batch.micro_size)


def _prompt_source(config: PpoConfig, layout: ParallelLayout, prompts: PromptDataset) -> PromptSource:
    order = RowOrder(
        len(prompts),
        seed=config.run.seed,
        batch_size=config.ppo.prompts,
        dp_size=layout.dp_size,
        dp_rank=layout.dp_rank,
        repeats=config.ppo.responses_per_prompt,
        minibatch_size=config.batch.global_size,
    )
    return PromptSource(prompts, order, layout, config.ppo.prompts * config.ppo.responses_per_prompt)
