"""Which models a command has: said once, for the checks, the builder, `plan` and the dry run."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_gil.config import (
    AuditConfig,
    CommandConfig,
    DpoConfig,
    EvaluateRewardConfig,
    GenerateConfig,
    PpoConfig,
    RewardConfig,
    ScoreConfig,
    SftConfig,
)
from megatron_gil.models.families import Head


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelUse:
    """A model of a run."""

    role: str
    """Its name in messages, metrics and checkpoints."""
    key: str
    """models.KEY names the directory that it starts from."""
    head: Head
    trained: bool = False
    num_groups: int = 0
    """Of the group classifier beside the value head; 0: there is none."""
    scores_from_start: bool = False
    """Its directory must hold a score head."""
    stays: bool = False
    """Though frozen it is read all the time, and never waits in host memory."""
    reads_text: bool = False
    """It has a tokenizer of its own, and reads prompts and responses as text."""


def model_uses(config: CommandConfig) -> tuple[ModelUse, ...]:
    """The models of a run in the order in which they are built; the first one brings the tokenizer. None where
    reward.function alone scores texts."""
    policy = ModelUse(role="policy", key="policy", head="lm", trained=True)
    ref_policy = ModelUse(role="ref_policy", key="ref_policy" if config.models.ref_policy else "policy", head="lm")
    reward_model = ModelUse(role="reward_model", key="reward_model", head="score", scores_from_start=True)
    match config:
        case SftConfig():
            return (policy,)
        case RewardConfig():
            return (replace(reward_model, trained=True, scores_from_start=False),)
        case DpoConfig():
            return policy, ref_policy
        case PpoConfig():
            read_text = config.models.reward_tokenizer == "own"
            if isinstance(config, AuditConfig):  # the policy is at rest
                policy = replace(policy, trained=False, stays=True)
            scorer = [replace(reward_model, reads_text=read_text)] * has_reward_model(config)
            return policy, ref_policy, *_critics(config), *scorer
        case GenerateConfig():
            return (replace(policy, trained=False),)
        case ScoreConfig() | EvaluateRewardConfig():
            return (reward_model,) if has_reward_model(config) else ()
    raise AssertionError(f"no models are known for {type(config).__name__}")


def has_reward_model(config: PpoConfig | ScoreConfig | EvaluateRewardConfig) -> bool:
    """Whether a model gives scores; else reward.function alone does."""
    return bool(config.models.reward_model) or config.reward.function is None


def _critics(config: PpoConfig) -> list[ModelUse]:
    """The critic, where advantages need one, and the group classifier, where it has a model of its own."""
    gil, has_critic = config.gil, config.ppo.advantages == "gae"
    scorer = "reward_model" if has_reward_model(config) else "policy"
    key = "critic" if config.models.critic else scorer
    critic = ModelUse(role="critic", key=key, head="critic", trained=True, num_groups=gil.num_groups * gil.is_in_critic)
    classifier = replace(critic, role="classifier", key=scorer, num_groups=gil.num_groups)
    return [critic] * has_critic + [classifier] * (gil.is_learned and not gil.is_in_critic)
