"""What a run puts on each rank, read from its config: the models, and how many rows they take at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_gil.config import BatchSection, CommandConfig, DpoConfig, PpoConfig, RewardConfig
from megatron_gil.models.families import ModelSpec
from megatron_gil.models.uses import model_uses
from megatron_gil.planning.memory import Cut, Precision, Rows, SizedModel

DEFAULT_SLOTS = 64
"""Slots assumed where sampling.micro_size is null. A run takes more or fewer, as its GPU's memory allows."""
BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutShape:
    """How a PPO iteration samples; over all ranks."""

    num_rows: int
    prompt_tokens: int
    new_tokens: int
    micro_size: int
    """Slots: rows decoded together on one rank."""
    epochs: int
    num_iterations: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What memory and time of a training run depend on. Rows are as long as the config's limits allow, so results
    are upper bounds."""

    models: tuple[SizedModel, ...]
    global_size: int
    """Rows of an update (pairs count once), over all ranks."""
    sequences_per_row: int
    """2 for pairs."""
    micro_size: int
    num_tokens: int
    precision: Precision
    rollout: RolloutShape | None = None
    """None: an iteration is one update of the only trained model."""
    offload: str = "none"
    """models.offload."""

    def num_microbatches(self, cut: Cut) -> int:
        return max(1, self.global_size // (cut.dp_size * self.micro_size))

    def rows(self, cut: Cut) -> Rows:
        """Of one microbatch of an update."""
        return Rows(
            num_rows=self.micro_size * self.sequences_per_row,
            num_tokens=self.num_tokens,
            num_microbatches=self.num_microbatches(cut),
            num_responses=self.rollout.new_tokens if self.rollout else None,
        )

    def decoded_rows(self, cut: Cut) -> Rows:
        """The slots of one rank and the positions of each. Pipeline ranks decode rows of their own."""
        assert self.rollout is not None
        rollout = self.rollout
        return Rows(
            num_rows=min(rollout.micro_size, -(-rollout.num_rows // (cut.dp_size * cut.pp_size))),
            num_tokens=rollout.prompt_tokens + rollout.new_tokens,
        )

    def shared_by(self, dp_size: int) -> Workload:
        """The same workload with a batch that dp_size divides: the next larger one where needed. The rollout grows
        with it, so that it has as many updates as before."""
        global_size = -(-self.global_size // dp_size) * dp_size
        rollout = self.rollout
        if rollout is not None:
            rollout = replace(rollout, num_rows=rollout.num_rows // self.global_size * global_size)
        return replace(self, global_size=global_size, rollout=rollout)

    def with_micro_size(self, micro_size: int, recompute: str) -> Workload:
        return replace(self, micro_size=micro_size, precision=replace(self.precision, recompute=recompute))

    def with_offload(self, offload: str) -> Workload:
        return replace(self, offload=offload)


def read_workload(config: CommandConfig, spec_of: Callable[[str], ModelSpec]) -> Workload:
    """spec_of: the sizes of a model by its role."""
    models = tuple(
        SizedModel(
            role=use.role,
            spec=spec_of(use.role),
            head=use.head,
            trained=use.trained,
            num_groups=use.num_groups,
            stays=use.stays,
        )
        for use in model_uses(config)
    )
    rollout = _read_rollout(config) if isinstance(config, PpoConfig) else None
    num_tokens = config.data.max_tokens if rollout is None else rollout.prompt_tokens + rollout.new_tokens
    sequences_per_row = 2 if isinstance(config, RewardConfig | DpoConfig) else 1
    return Workload(
        models=models,
        global_size=config.batch.global_size,
        micro_size=_full_rows(config.batch, num_tokens * sequences_per_row),
        precision=Precision(dtype_bytes=BYTES[config.models.dtype], recompute=config.models.recompute),
        num_tokens=num_tokens,
        sequences_per_row=sequences_per_row,
        rollout=rollout,
        offload=config.models.offload,
    )


def _full_rows(batch: BatchSection, row_tokens: int) -> int:
    """Rows of full length that have at least as many tokens as a microbatch."""
    return batch.micro_size if batch.micro_tokens is None else -(-batch.micro_tokens // row_tokens)


def _read_rollout(config: PpoConfig) -> RolloutShape:
    ppo, sampling = config.ppo, config.sampling
    return RolloutShape(
        num_rows=ppo.num_rows,
        prompt_tokens=config.data.max_prompt_tokens,
        new_tokens=sampling.max_new_tokens,
        micro_size=sampling.micro_size or DEFAULT_SLOTS,
        epochs=ppo.epochs,
        num_iterations=ppo.iterations,
    )
