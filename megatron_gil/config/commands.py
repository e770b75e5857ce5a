"""The config of each command, and the sizes that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from omegaconf import MISSING

from megatron_gil.config.ppo_sections import AlarmSection, AuditSection, GilSection, PpoSection
from megatron_gil.config.section import path, require
from megatron_gil.config.sections import (
    AuditRunSection,
    BatchSection,
    CheckpointSection,
    CriticOptimizerSection,
    DataSection,
    DpoSection,
    LogSection,
    ModelsSection,
    OptimizerSection,
    ParallelSection,
    PolicyOptimizerSection,
    RewardFunctionSection,
    RewardSection,
    RunSection,
    SamplingSection,
    TrainingRunSection,
    TrainSection,
)


def _section(cls: type) -> Any:
    return field(default_factory=cls)


def _check_reward(reward: RewardFunctionSection, parallel: ParallelSection) -> None:
    require(
        reward.function is None or reward.timeout_s < parallel.timeout_s,
        f"reward.timeout_s={reward.timeout_s:g} must lie below parallel.timeout_s={parallel.timeout_s:g}, or ranks "
        "that wait for the function give up first; lower the first or raise the second",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandConfig:
    """What every command has. `base` names a YAML file that this one changes."""

    run: RunSection = _section(RunSection)
    models: ModelsSection = _section(ModelsSection)
    parallel: ParallelSection = _section(ParallelSection)
    data: DataSection = _section(DataSection)
    batch: BatchSection = _section(BatchSection)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig(CommandConfig):
    """What every training command has."""

    run: TrainingRunSection = _section(TrainingRunSection)
    optimizer: OptimizerSection = _section(OptimizerSection)
    checkpoint: CheckpointSection = _section(CheckpointSection)
    log: LogSection = _section(LogSection)

    def __post_init__(self) -> None:
        require(
            self.checkpoint.keep_best is None or (bool(self.data.eval) and self.log.eval_every > 0),
            f"checkpoint.keep_best={self.checkpoint.keep_best} compares evaluations: set data.eval=FILE and "
            "log.eval_every above 0",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SftConfig(TrainConfig):
    train: TrainSection = _section(TrainSection)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig(TrainConfig):
    train: TrainSection = _section(TrainSection)
    reward: RewardSection = _section(RewardSection)


@dataclass(frozen=True, slots=True, kw_only=True)
class DpoConfig(TrainConfig):
    train: TrainSection = _section(TrainSection)
    dpo: DpoSection = _section(DpoSection)


@dataclass(frozen=True, slots=True, kw_only=True)
class PpoConfig(TrainConfig):
    optimizer: OptimizerSection = _section(PolicyOptimizerSection)
    critic_optimizer: OptimizerSection = _section(CriticOptimizerSection)
    sampling: SamplingSection = _section(SamplingSection)
    reward: RewardFunctionSection = _section(RewardFunctionSection)
    ppo: PpoSection = _section(PpoSection)
    gil: GilSection = _section(GilSection)
    alarms: AlarmSection = _section(AlarmSection)

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)  # super() does not work in a dataclass with slots
        _check_reward(self.reward, self.parallel)
        require(
            self.ppo.kl_target is None or not self.gil.has_groups,
            "ppo.kl_target holds one KL for all rows; with groups set gil.kl_target_high and gil.kl_target_low",
        )
        for name, target in (("ppo.kl_target", self.ppo.kl_target), ("gil.kl_target_high", self.gil.kl_target_high)):
            require(
                target is None or self.ppo.kl_coef > 0,
                f"{name}={target} moves a coefficient that starts at ppo.kl_coef, which is 0; set it above 0",
            )
        require(
            self.ppo.num_rows % self.batch.global_size == 0,
            f"ppo.prompts={self.ppo.prompts} x ppo.responses_per_prompt={self.ppo.responses_per_prompt} cannot be "
            f"divided by batch.global_size={self.batch.global_size}; change one of them",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig(CommandConfig):
    sampling: SamplingSection = _section(SamplingSection)
    output: str = path(MISSING)
    """JSON Lines of {"prompt", "response"} with the other fields of the prompts' rows, in the order of the prompts;
    must not exist yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreConfig(CommandConfig):
    reward: RewardFunctionSection = _section(RewardFunctionSection)
    output: str = path(MISSING)
    """JSON Lines of {"prompt", "response", "score"}, or of {"prompt", "chosen", "rejected", "score_chosen",
    "score_rejected"} where data.train holds pairs, with the other fields of the rows; must not exist yet."""

    def __post_init__(self) -> None:
        _check_reward(self.reward, self.parallel)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateRewardConfig(CommandConfig):
    reward: RewardFunctionSection = _section(RewardFunctionSection)
    output: str = path(MISSING)
    """The numbers, NAME.json; beside it lie the table NAME.md, the picture NAME.svg and the scored pairs
    NAME.scored.jsonl. None of the four may exist yet."""

    def __post_init__(self) -> None:
        _check_reward(self.reward, self.parallel)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditConfig(PpoConfig):
    """What the planned ppo run has, so that its file is taken as it is."""

    run: AuditRunSection = _section(AuditRunSection)
    audit: AuditSection = _section(AuditSection)
    output: str = path(MISSING)
    """The numbers, NAME.json; the page NAME.html lies beside it. Neither may exist yet."""

    def __post_init__(self) -> None:
        PpoConfig.__post_init__(self)
        require(
            self.gil.num_groups > 1,
            f"gil.num_groups={self.gil.num_groups} makes one group of all rows, and there is nothing to audit; set it "
            "to 2 or more",
        )


COMMAND_CONFIGS: Mapping[str, type[CommandConfig]] = {
    "sft": SftConfig,
    "reward": RewardConfig,
    "dpo": DpoConfig,
    "ppo": PpoConfig,
    "generate": GenerateConfig,
    "score": ScoreConfig,
    "evaluate-reward": EvaluateRewardConfig,
    "audit": AuditConfig,
}


def data_parallel_size(world_size: int, parallel: ParallelSection) -> int:
    """Raises ConfigError with both numbers where the model's ranks do not divide the processes."""
    model_size = parallel.tensor_size * parallel.pipeline_size
    require(
        world_size % model_size == 0,
        f"{world_size} processes cannot be divided by parallel.tensor_size={parallel.tensor_size} x "
        f"parallel.pipeline_size={parallel.pipeline_size} = {model_size}; start a multiple of {model_size}",
    )
    return world_size // model_size


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """Every size that follows from others."""

    dp_size: int
    local_size: int
    """Rows of one update on one data-parallel rank."""
    microbatches: str
    """How an update is cut on each, in words."""

    @classmethod
    def of(cls, world_size: int, parallel: ParallelSection, batch: BatchSection) -> Self:
        """Raises ConfigError with both numbers where a division is not exact."""
        dp_size = data_parallel_size(world_size, parallel)
        local_size = batch.global_size // dp_size
        if batch.micro_tokens is not None:
            require(
                batch.global_size % dp_size == 0,
                f"batch.global_size={batch.global_size} cannot be divided by {dp_size} data-parallel ranks; change it",
            )
            microbatches = f"microbatches of at most {batch.micro_tokens:,} tokens"
        else:
            require(
                batch.global_size % (dp_size * batch.micro_size) == 0,
                f"batch.global_size={batch.global_size} cannot be divided by {dp_size} data-parallel ranks x "
                f"batch.micro_size={batch.micro_size} = {dp_size * batch.micro_size}; change one of them",
            )
            microbatches = f"{local_size // batch.micro_size} microbatch(es) of {batch.micro_size}"
        return cls(dp_size=dp_size, local_size=local_size, microbatches=microbatches)
