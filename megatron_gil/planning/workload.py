"""What a run puts on each rank, read from its config: which models, and how many rows at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_gil.config import CommandConfig, ConfigError, PpoConfig
from megatron_gil.models.llama import LlamaSpec
from megatron_gil.planning.memory import Cut, ModelUse, Precision, Rows

DEFAULT_SLOTS = 64
"""Where sampling.micro_size is null; a GPU with room takes more, one without takes fewer."""
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
    """A training run, as far as memory and time go. Rows are as long as the config's limits allow: upper bounds."""

    models: tuple[ModelUse, ...]
    global_size: int
    """Rows of an update (pairs count once), over all ranks."""
    sequences_per_row: int
    """2 for pairs."""
    micro_size: int
    num_tokens: int
    precision: Precision
    rollout: RolloutShape | None = None
    """None: an iteration is one update of the only trained model."""

    def num_microbatches(self, cut: Cut) -> int:
        return max(1, self.global_size // (cut.dp_size * self.micro_size))

    def rows(self, cut: Cut) -> Rows:
        """Of one microbatch of an update."""
        return Rows(
            num_rows=self.micro_size * self.sequences_per_row,
            num_tokens=self.num_tokens,
            num_microbatches=self.num_microbatches(cut),
        )

    def decoded_rows(self, cut: Cut) -> Rows:
        """The slots of one rank and the positions of each; pipeline ranks answer rows of their own."""
        assert self.rollout is not None
        rollout = self.rollout
        return Rows(
            num_rows=min(rollout.micro_size, -(-rollout.num_rows // (cut.dp_size * cut.pp_size))),
            num_tokens=rollout.prompt_tokens + rollout.new_tokens,
        )

    def shared_by(self, dp_size: int) -> Workload:
        """The same with as many rows more as it takes to share an update out evenly; the updates of a rollout stay as
        many."""
        global_size = -(-self.global_size // dp_size) * dp_size
        rollout = self.rollout
        if rollout is not None:
            rollout = replace(rollout, num_rows=rollout.num_rows // self.global_size * global_size)
        return replace(self, global_size=global_size, rollout=rollout)

    def with_micro_size(self, micro_size: int, recompute: str) -> Workload:
        return replace(self, micro_size=micro_size, precision=replace(self.precision, recompute=recompute))


def read_workload(command: str, config: CommandConfig, specs: Mapping[str, LlamaSpec]) -> Workload:
    """specs: of each model by its role."""
    settings: dict[str, Any] = {
        "global_size": config.batch.global_size,
        "micro_size": config.batch.micro_size,
        "precision": Precision(dtype_bytes=BYTES[config.models.dtype], recompute=config.models.recompute),
    }
    if isinstance(config, PpoConfig):
        return _read_ppo(config, specs, settings)
    settings["num_tokens"] = config.data.max_tokens
    settings["sequences_per_row"] = 1 if command == "sft" else 2
    if command == "reward":
        return Workload(models=(_use("reward_model", specs, "score", True),), **settings)
    models = [_use("policy", specs, "lm", True)]
    if command == "dpo":
        models.append(_use("ref_policy", specs, "lm", False))
    return Workload(models=tuple(models), **settings)


def _read_ppo(config: PpoConfig, specs: Mapping[str, LlamaSpec], settings: dict[str, Any]) -> Workload:
    ppo, gil = config.ppo, config.gil
    learned = gil.num_groups > 1 and gil.groups == "learned"
    in_head = learned and gil.classifier == "critic_head"
    models = [_use("policy", specs, "lm", True), _use("ref_policy", specs, "lm", False)]
    if ppo.advantages == "gae":
        models.append(_use("critic", specs, "critic", True, gil.num_groups if in_head else 0))
    models.append(_use("reward_model", specs, "score", False))
    if learned and not in_head:
        models.append(replace(_use("reward_model", specs, "critic", True, gil.num_groups), role="classifier"))
    sampling, num_rows = config.sampling, ppo.prompts * ppo.responses_per_prompt
    if num_rows % config.batch.global_size:
        raise ConfigError(
            f"ppo.prompts={ppo.prompts} x ppo.responses_per_prompt={ppo.responses_per_prompt} cannot be divided by "
            f"batch.global_size={config.batch.global_size}; change one of them"
        )
    return Workload(
        models=tuple(models),
        num_tokens=config.data.max_prompt_tokens + sampling.max_new_tokens,
        sequences_per_row=1,
        rollout=RolloutShape(
            num_rows=num_rows,
            prompt_tokens=config.data.max_prompt_tokens,
            new_tokens=sampling.max_new_tokens,
            micro_size=sampling.micro_size or DEFAULT_SLOTS,
            epochs=ppo.epochs,
            num_iterations=ppo.iterations,
        ),
        **settings,
    )


def _use(role: str, specs: Mapping[str, LlamaSpec], head: Any, trained: bool, num_groups: int = 0) -> ModelUse:
    return ModelUse(role=role, spec=specs[role], head=head, trained=trained, num_groups=num_groups)
