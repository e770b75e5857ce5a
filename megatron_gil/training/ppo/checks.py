"""What PPO's sizes and groups must fulfil. The run and its dry run, which knows no process group, both ask here."""

from __future__ import annotations

from megatron_gil.config import ConfigError, PpoConfig
from megatron_gil.data.rows.prompts import PromptDataset


def check_rollout(config: PpoConfig, dp_size: int, train: PromptDataset) -> None:
    _check_comparisons(config, dp_size)
    if config.gil.groups == "known" and train.num_labelled < len(train):
        raise ConfigError(
            f"data.train={config.data.train}: gil.groups=known needs a group in every row, "
            f"{len(train) - train.num_labelled} of {len(train)} have none"
        )


def _check_comparisons(config: PpoConfig, dp_size: int) -> None:
    """What rloo and grpo need."""
    if config.ppo.advantages == "gae":
        return
    share, count = config.batch.global_size // dp_size, config.ppo.responses_per_prompt
    if share % count:
        raise ConfigError(
            f"ppo.advantages={config.ppo.advantages} needs a prompt's responses on one rank: batch.global_size="
            f"{config.batch.global_size} / {dp_size} data-parallel ranks = {share} rows cannot be divided by "
            f"ppo.responses_per_prompt={count}"
        )
    if config.gil.is_in_critic:
        raise ConfigError(
            f"ppo.advantages={config.ppo.advantages} has no critic to hold the group classifier; "
            "set gil.classifier=own_model"
        )
