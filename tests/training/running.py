"""What ranks run in the tests of engine and training: layouts, models and a whole PpoTrainer on the tiny world."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_gil import config as c
from megatron_gil.data.rows.order import RowOrder
from megatron_gil.data.rows.prompts import PromptDataset
from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.engine.generation import Generator
from megatron_gil.engine.megatron import MegatronModel, TrainableModel
from megatron_gil.models.hf import WeightMap
from megatron_gil.models.llama import LlamaSpec
from megatron_gil.parallel.collectives import all_sum
from megatron_gil.parallel.layout import ParallelLayout, start_parallel, stop_parallel
from megatron_gil.training.build import start_group_head
from megatron_gil.training.ppo.grouping import Grouping, LearnedGroups, SingleGroup
from megatron_gil.training.ppo.iteration import PpoTrainer
from megatron_gil.training.row_source import PromptSource
from megatron_gil.training.run.progress import Progress
from megatron_gil.training.run.signals import StopSignal
from megatron_gil.types import Metrics

ONE = {"tensor_size": 1, "pipeline_size": 1}
TP2 = {"tensor_size": 2, "pipeline_size": 1}
TP2_SP = {**TP2, "sequence_parallel": True}
PP2 = {"tensor_size": 1, "pipeline_size": 2}
DP2 = {**ONE, "world": 2}
TP2_PP2 = {"tensor_size": 2, "pipeline_size": 2}


def world_size(layout: dict[str, Any]) -> int:
    return layout.get("world", layout["tensor_size"] * layout["pipeline_size"])


def layout_name(layout: dict[str, Any]) -> str:
    dp_size = world_size(layout) // (layout["tensor_size"] * layout["pipeline_size"])
    suffix = "_sp" if layout.get("sequence_parallel") else ""
    return f"tp{layout['tensor_size']}_pp{layout['pipeline_size']}_dp{dp_size}{suffix}"


@contextmanager
def parallel(layout: dict[str, Any]) -> Iterator[ParallelLayout]:
    section = {key: value for key, value in layout.items() if key != "world"}
    started = start_parallel(c.ParallelSection(**section, timeout_s=60.0), seed=5)
    try:
        yield started
    finally:
        stop_parallel()


class GradientModel(TrainableModel):
    """A model whose update takes no step: it keeps the gradients that the optimizer would get."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "optimizer": None})
        self.gradients: list[dict[str, Tensor]] = []

    def update(self, *parts: Any, lr: float) -> Metrics:
        metrics, _ = self.accumulate(*parts)
        self.gradients.append(full_gradients(self))
        return metrics


def build(
    hf_dir: Path,
    layout: ParallelLayout,
    head: Any,
    *,
    kind: type[MegatronModel] = MegatronModel,
    micro_size: int = 4,
    **kwargs: Any,
) -> Any:
    model = kind(LlamaSpec.read(hf_dir), layout, head=head, micro_size=micro_size, **kwargs)
    model.load(hf_dir)
    return model


def full_gradients(model: TrainableModel) -> dict[str, Tensor]:
    """The accumulated gradients of this pipeline stage under Hugging Face's names."""
    return _full(model, {name: parameter.main_grad for name, parameter in model.module.named_parameters()})


def full_weights(model: MegatronModel) -> dict[str, Tensor]:
    return _full(model, dict(model.module.named_parameters()))


def _full(model: MegatronModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = WeightMap(model.spec, model.module, model.layout)
    return {
        key: full.detach().clone()  # buffers are written again
        for name, tensor in tensors.items()
        for key, full in weights.to_full(name, tensor).items()
    }


def merge(ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All ranks' tensors by name; one that several hold must be the same on each, bit for bit."""
    merged: dict[str, Tensor] = {}
    for rank in ranks:
        for name, tensor in rank.items():
            assert name not in merged or torch.equal(merged[name], tensor), f"ranks differ in {name}"
            merged[name] = tensor
    return merged


def ppo_config(**sections: dict[str, Any]) -> c.PpoConfig:
    """Sizes of the tiny world; every section can be changed."""
    values: dict[str, dict[str, Any]] = {
        "run": {"dir": "unused", "seed": 3},
        "batch": {"global_size": 16, "micro_size": 4},
        "optimizer": {"lr": 1e-2, "schedule": "constant", "warmup_fraction": 0.0},
        "critic_optimizer": {"lr": 1e-2, "schedule": "constant", "warmup_fraction": 0.0},
        "sampling": {"max_new_tokens": 10, "micro_size": 16},
        "ppo": {"iterations": 4, "prompts": 8, "responses_per_prompt": 2},
        "gil": {"warmup_updates": 0, "ramp_updates": 0, "invariance_coef": 0.3},
    }
    for name, changes in sections.items():
        values[name] = {**values[name], **changes}
    kinds = {
        "run": c.TrainingRunSection,
        "batch": c.BatchSection,
        "optimizer": c.OptimizerSection,
        "critic_optimizer": c.OptimizerSection,
        "sampling": c.SamplingSection,
        "ppo": c.PpoSection,
        "gil": c.GilSection,
    }
    made: dict[str, Any] = {name: kinds[name](**values[name]) for name in kinds}
    return c.PpoConfig(**made)


def make_trainer(
    config: c.PpoConfig,
    root: Path,
    layout: ParallelLayout,
    *,
    kind: type[TrainableModel] = TrainableModel,
    policy: str = "policy",
    grouping: Grouping | None = None,
    dtype: torch.dtype = torch.float32,
) -> PpoTrainer:
    """As the command builds it, from the world's models; the reference is the policy as it starts."""
    tokenizer, prompts = read_prompts(config, root, layout)
    gil, sums = config.gil, all_sum(layout)
    if grouping is None:
        grouping = LearnedGroups(gil, sums) if gil.num_groups > 1 else SingleGroup(sums)
    in_head = isinstance(grouping, LearnedGroups) and gil.classifier == "critic_head"
    common: dict[str, Any] = {"micro_size": config.batch.micro_size, "dtype": dtype}

    def trainable(name: str, head: str, optimizer: c.OptimizerSection, num_groups: int = 0) -> Any:
        model = build(root / name, layout, head, kind=kind, optimizer=optimizer, num_groups=num_groups, **common)
        if num_groups:
            start_group_head(model, gil, seed=1)
        return model

    progress = Progress(StopSignal())
    progress.attend(layout)
    own = (
        trainable("reward_model", "critic", config.critic_optimizer, gil.num_groups)
        if not in_head and isinstance(grouping, LearnedGroups)
        else None
    )
    model = trainable(policy, "lm", config.optimizer)
    return PpoTrainer(
        config,
        policy=model,
        ref_policy=build(root / policy, layout, "lm", **common),
        critic=trainable("reward_model", "critic", config.critic_optimizer, gil.num_groups if in_head else 0),
        reward_model=build(root / "reward_model", layout, "score", **common),
        classifier=own,
        grouping=grouping,
        sampler=Generator(model, config.sampling, tokenizer=tokenizer, seed=config.run.seed),
        prompts=prompts,
        eval_prompts=None,
        pretrain=None,
        tokenizer=tokenizer,
        progress=progress,
        all_sum=sums,
    )


def read_prompts(config: c.PpoConfig, root: Path, layout: ParallelLayout) -> tuple[Tokenizer, PromptSource]:
    use_cache(root)
    tokenizer = Tokenizer.read(root / "policy")
    dataset = PromptDataset(root / "prompts.jsonl", tokenizer, max_prompt_tokens=64)
    order = RowOrder(
        len(dataset),
        seed=config.run.seed,
        batch_size=config.ppo.prompts,
        dp_size=layout.dp_size,
        dp_rank=layout.dp_rank,
        repeats=config.ppo.responses_per_prompt,
        minibatch_size=config.batch.global_size,
    )
    return tokenizer, PromptSource(dataset, order, layout, config.ppo.prompts * config.ppo.responses_per_prompt)


def use_cache(root: Path) -> None:
    """Of `datasets`, in this process alone."""
    os.environ["HF_DATASETS_CACHE"] = str(root / "cache")
