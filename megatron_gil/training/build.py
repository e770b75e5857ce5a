"""Building the models of a command: sizes from config.json, weights from a directory, heads that no directory has."""

from __future__ import annotations

import math
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from megatron_gil.config import CommandConfig, ConfigError, GilSection, OptimizerSection
from megatron_gil.engine.megatron import MegatronModel, TrainableModel
from megatron_gil.models.heads import ScalarHead
from megatron_gil.models.hf_files import HfTensors
from megatron_gil.models.llama import Head, LlamaSpec, check_layout
from megatron_gil.parallel.collectives import agree, gather_objects
from megatron_gil.parallel.layout import ParallelLayout


def model_path(config: CommandConfig, role: str) -> Path:
    """The directory of a role; ConfigError where neither it nor what it falls back to is set."""
    fallback = {"ref_policy": "policy", "critic": "reward_model"}.get(role)
    value = getattr(config.models, role) or (fallback and getattr(config.models, fallback))
    if not value:
        raise ConfigError(f"models.{role} is not set; give the directory of a Llama, as models.{role}=DIR")
    path = Path(value)
    if not path.is_dir():
        raise ConfigError(f"models.{role}={value} is not a directory")
    return path


def read_spec(config: CommandConfig, role: str) -> LlamaSpec:
    """The sizes of a role's model, checked against the layout before anything is built."""
    spec = LlamaSpec.read(model_path(config, role))
    parallel = config.parallel
    check_layout(spec, parallel.tensor_size, parallel.pipeline_size, parallel.sequence_parallel)
    return spec


def check_model(config: CommandConfig, role: str, *, scored: bool = False) -> None:
    """ConfigError for a model that is absent, unreadable, not a Llama, too small for the layout, or, where it must give
    scores, without a score head; from the files' headers alone."""
    read_spec(config, role)
    path = model_path(config, role)
    tensors = HfTensors.open(path)
    if scored and "score.weight" not in tensors:
        raise ConfigError(f"models.{role}={path} has no score.weight; train it with `megatron-gil reward` first")


def build_frozen(config: CommandConfig, role: str, head: Head, layout: ParallelLayout) -> MegatronModel:
    """A model that is only read: the reference, the reward model, or whatever generate and score use."""
    model = MegatronModel(
        read_spec(config, role), layout, head=head, micro_size=config.batch.micro_size, models=config.models
    )
    _load(model, model_path(config, role))
    return model


def build_trainable(
    config: CommandConfig, role: str, head: Head, layout: ParallelLayout, optimizer: OptimizerSection, **kwargs: Any
) -> tuple[TrainableModel, list[str]]:
    """(model with optimizer, head tensors that its directory lacks)."""
    model = TrainableModel(
        read_spec(config, role),
        layout,
        head=head,
        micro_size=config.batch.micro_size,
        models=config.models,
        optimizer=optimizer,
        distributed_optimizer=config.parallel.distributed_optimizer,
        **kwargs,
    )
    return model, _load(model, model_path(config, role))


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
