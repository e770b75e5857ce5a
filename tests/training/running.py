"""What ranks run in the tests of engine and training: layouts, models and a whole PpoTrainer on the tiny world."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_gil import config as c
from megatron_gil.commands.train import make_ppo_trainer
from megatron_gil.data.rows.prompts import PromptDataset
from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.engine.megatron import MegatronModel, TrainableModel
from megatron_gil.engine.protocol import Update
from megatron_gil.models.families import read_spec
from megatron_gil.models.hf import WeightMap
from megatron_gil.parallel.layout import ParallelLayout, start_parallel, stop_parallel
from megatron_gil.training.build import build_model
from megatron_gil.training.check_run import check_run
from megatron_gil.training.ppo.grouping import Grouping
from megatron_gil.training.ppo.iteration import PpoTrainer
from megatron_gil.training.row_source import PromptSource
from megatron_gil.training.run.progress import Progress
from megatron_gil.training.run.signals import StopSignal
from tests.gathered import full_tensors

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

    def update(self, *parts: Any, lr: float) -> Update:
        found = self.accumulate(*parts)
        self.gradients.append(full_gradients(self))
        return Update(metrics=found.metrics, row_numbers=found.row_numbers)


def build(
    hf_dir: Path,
    layout: ParallelLayout,
    head: Any,
    *,
    kind: type[MegatronModel] = MegatronModel,
    micro_size: int = 4,
    **kwargs: Any,
) -> Any:
    model = kind(read_spec(hf_dir), layout, head=head, micro_size=micro_size, **kwargs)
    model.load(hf_dir)
    return model


def full_gradients(model: TrainableModel) -> dict[str, Tensor]:
    """The accumulated gradients of this pipeline stage under Hugging Face's names."""
    return _full(model, {name: parameter.main_grad for name, parameter in model.module.named_parameters()})  # type: ignore[attr-defined]


def full_weights(model: MegatronModel) -> dict[str, Tensor]:
    return _full(model, dict(model.module.named_parameters()))


def _full(model: MegatronModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = WeightMap(model.spec, model.module, model.layout)
    return {
        key: full.detach().clone()  # buffers are written again
        for name, tensor in tensors.items()
        for key, full in full_tensors(weights, name, tensor).items()
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
    ref_policy: str | None = None,
    grouping: Grouping | None = None,
    dtype: torch.dtype = torch.float32,
    offload: Any = "none",
) -> PpoTrainer:
    """As the command makes it, from the world's models; without ref_policy the reference is the policy as it starts."""
    use_cache(root)
    models = c.ModelsSection(
        policy=str(root / policy),
        ref_policy=None if ref_policy is None else str(root / ref_policy),
        reward_model=str(root / "reward_model"),
        offload=offload,
    )
    data = c.DataSection(train=str(root / "prompts.jsonl"), max_prompt_tokens=32)
    config = replace(config, models=models, data=data)
    checked = check_run(config, layout.world_size)
    built = {
        use.role: build_model(config, use, checked.specs[use.role], layout, kind=kind, dtype=dtype)
        for use in checked.uses
    }
    for model in built.values():
        model.offload()
    progress = Progress(StopSignal())
    progress.attend(layout)
    trainer = make_ppo_trainer(config, checked, built, layout, progress)
    trainer.grouping = grouping or trainer.grouping
    return trainer


def trained_models(trainer: PpoTrainer) -> dict[str, TrainableModel]:
    """What a checkpoint would hold."""
    models = {role: getattr(trainer.models, role) for role in ("policy", "critic", "classifier")}
    return {role: model for role, model in models.items() if model is not None}


def read_prompts(config: c.PpoConfig, root: Path, layout: ParallelLayout) -> tuple[Tokenizer, PromptSource]:
    use_cache(root)
    tokenizer = Tokenizer.read(root / "policy")
    dataset = PromptDataset(root / "prompts.jsonl", tokenizer, max_prompt_tokens=64)
    return tokenizer, PromptSource.shuffled(dataset, config, layout)


def use_cache(root: Path) -> None:
    """Of `datasets`, in this process alone."""
    os.environ["HF_DATASETS_CACHE"] = str(root / "cache")
