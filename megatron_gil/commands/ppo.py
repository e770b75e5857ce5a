"""The parts of a PPO trainer, put together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_gil.config import PpoConfig
from megatron_gil.engine.generation import Generator
from megatron_gil.parallel.collectives import all_sum
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.training.check_run import CheckedRun
from megatron_gil.training.ppo.grouping import make_grouping
from megatron_gil.training.ppo.iteration import Models, PpoTrainer
from megatron_gil.training.ppo.reward_text import RewardText
from megatron_gil.training.ppo.scorers import make_scorer
from megatron_gil.training.row_source import PromptSource, RowSource
from megatron_gil.training.run.progress import Progress


def make_ppo_trainer(
    config: PpoConfig,
    checked: CheckedRun,
    models: Mapping[str, Any],
    layout: ParallelLayout,
    progress: Progress,
) -> PpoTrainer:
    """To have another sampler or scorer, put it here."""
    tokenizer, own = checked.tokenizers.tokenizer, checked.tokenizers.reward
    text = own and RewardText(tokenizer, own, max_tokens=checked.specs["reward_model"].max_positions)
    held_out = checked.held_out
    return PpoTrainer(
        config,
        Models(
            policy=models["policy"],
            ref_policy=models["ref_policy"],
            critic=models.get("critic"),
            classifier=models.get("classifier"),
            sampler=Generator(models["policy"], config.sampling, tokenizer=tokenizer, seed=config.run.seed),
            scorer=make_scorer(config.reward, checked.function, models, text=text, tokenizer=tokenizer, layout=layout),
        ),
        grouping=make_grouping(
            config.gil,
            num_known=len(checked.train.group_names),
            all_sum=all_sum(layout),
            kl_target=config.ppo.kl_target,
        ),
        prompts=PromptSource.shuffled(checked.train, config, layout),
        eval_prompts=None if held_out is None else PromptSource(held_out, None, layout, len(held_out)),
        pretrain=None if checked.pretrain is None else RowSource.shuffled(checked.pretrain, config, layout),
        tokenizer=tokenizer,
        progress=progress,
        layout=layout,
        score_range=checked.score_range,
    )
