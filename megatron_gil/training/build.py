"""Building the models of a command: sizes from config.json, weights from a directory, heads that no directory has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from megatron_gil.config import CommandConfig, GilSection, ParallelSection, PpoConfig, TrainConfig
from megatron_gil.engine.megatron import MegatronModel, TrainableModel
from megatron_gil.models.families import ModelSpec
from megatron_gil.models.heads import ScalarHead
from megatron_gil.models.uses import ModelUse
from megatron_gil.parallel.collectives import agree, gather_objects
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.training.check_run import CheckedRun, model_path
from megatron_gil.training.run.progress import Progress


def build_models(
    config: CommandConfig, checked: CheckedRun, layout: ParallelLayout, progress: Progress
) -> dict[str, MegatronModel]:
    """Every model of the command by its role, with its weights; those that are trained are TrainableModels."""
    models = {}
    for use in checked.uses:
        progress.safe_point(f"building {use.role}")
        models[use.role] = build_model(config, use, checked.specs[use.role], layout)
        if isinstance(config, TrainConfig):  # else it is the only model, and always read
            models[use.role].offload()
    return models


def trained(models: Mapping[str, MegatronModel]) -> dict[str, TrainableModel]:
    """Those that a checkpoint holds."""
    return {role: model for role, model in models.items() if isinstance(model, TrainableModel)}


def build_model(
    config: CommandConfig,
    use: ModelUse,
    spec: ModelSpec,
    layout: ParallelLayout,
    *,
    kind: type[TrainableModel] = TrainableModel,
    dtype: torch.dtype | None = None,
) -> MegatronModel:
    """kind: of a model that is trained. dtype: another than models.dtype."""
    common: dict[str, Any] = {
        "head": use.head,
        "num_groups": use.num_groups,
        "micro_size": config.batch.micro_size,
        "micro_tokens": config.batch.micro_tokens,
        "models": replace(config.models, offload="none") if use.stays else config.models,
        "dtype": dtype,
    }
    if not use.trained:
        model = MegatronModel(spec, layout, **common)
        _load(model, model_path(config, use))
        return model
    assert isinstance(config, TrainConfig)
    model = kind(
        spec,
        layout,
        optimizer=config.critic_optimizer
        if isinstance(config, PpoConfig) and use.head == "critic"
        else config.optimizer,
        distributed_optimizer=config.parallel.distributed_optimizer,
        # Where communication overlaps, megatron-core waits for the gradient of every parameter; the value head of a
        # classifier of its own gets none.
        overlap=_overlaps(config.parallel, layout) and use.role != "classifier",
        **common,
    )
    absent = _load(model, model_path(config, use))
    if use.head == "score" and absent:
        start_score_head(model, config.run.seed)
    if use.num_groups and (use.role == "classifier" or "group_head.weight" in absent):
        assert isinstance(config, PpoConfig)
        start_group_head(model, config.gil, config.run.seed)
    return model


def _load(model: MegatronModel, path: Path) -> list[str]:
    """The head tensors that the directory lacks, on every rank: only the last pipeline stage looks for them."""
    absent = agree(model.layout, lambda: model.load(path))
    return sorted(set(chain.from_iterable(gather_objects(absent, model.layout))))


@torch.no_grad()
def start_score_head(model: TrainableModel, seed: int) -> None:
    """A new score head: normal, standard deviation 1 / sqrt(H + 1); the same on every rank."""
    if model.layout.is_last_pp_stage:
        weight = _heads(model).score.weight
        weight.copy_(_normal(weight.shape, 1 / math.sqrt(weight.shape[1] + 1), seed))
    _reload(model)


@torch.no_grad()
def start_group_head(model: TrainableModel, section: GilSection, seed: int) -> None:
    """The group classifier's first weights: rows from +alpha to -alpha times the score head, so that group 0 begins as
    the one of high reward; random where there is no score head to follow. Zero would be a stationary point."""
    if model.layout.is_last_pp_stage:
        heads = _heads(model)
        assert heads.group_head is not None, "the model has no group head"
        direction = heads.score.weight
        if not direction.any():
            direction = _normal(direction.shape, 1 / math.sqrt(direction.shape[1] + 1), seed).to(direction)
        scales = torch.linspace(section.init_scale, -section.init_scale, section.num_groups)
        heads.group_head.weight.copy_(scales.to(direction)[:, None] * direction)
    _reload(model)


def _heads(model: TrainableModel) -> ScalarHead:
    heads = model.module.output_layer
    assert isinstance(heads, ScalarHead)
    return heads


def _normal(shape: torch.Size, std: float, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def _reload(model: TrainableModel) -> None:
    if model.optimizer is not None:
        model.optimizer.reload_master_weights()


def _overlaps(parallel: ParallelSection, layout: ParallelLayout) -> bool:
    if parallel.overlap == "auto":
        return layout.device.type == "cuda" and layout.dp_size > 1
    return parallel.overlap == "on"
