"""Sizes of published models by name, and the reproduction's training runs, read from the recipe's YAML files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_gil import config as c
from megatron_gil.config.files import load_config
from megatron_gil.data.hub import fetched
from megatron_gil.models.families import LlamaSpec, MistralSpec, ModelSpec, Qwen2Spec, Qwen3Spec, read_spec


def _sizes(
    hidden_size: int,
    ffn_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    vocab_size: int = 32000,
    tied: bool = False,
    head_dim: int | None = None,
    family: type[ModelSpec] = LlamaSpec,
) -> ModelSpec:
    """Positions, RoPE and token ids are those of Llama 2: they change neither memory nor time."""
    return family(
        hidden_size=hidden_size,
        ffn_size=ffn_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim or hidden_size // num_heads,
        vocab_size=vocab_size,
        max_positions=4096,
        norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        tied=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )


SPECS = {
    "160m": _sizes(768, 3072, 12, 12, 12),  # JackFram/llama-160m
    "1.3b": _sizes(2048, 5504, 24, 16, 16),  # Sheared-LLaMA 1.3B
    "3b": _sizes(3072, 8192, 28, 24, 8, vocab_size=128256, tied=True),  # Llama 3.2: a large vocabulary, tied
    "7b": _sizes(4096, 11008, 32, 32, 32),
    "8b": _sizes(4096, 14336, 32, 32, 8, vocab_size=128256),  # Llama 3
    "13b": _sizes(5120, 13824, 40, 40, 40),
    "70b": _sizes(8192, 28672, 80, 64, 8),
    "mistral-7b": _sizes(4096, 14336, 32, 32, 8, vocab_size=32768, family=MistralSpec),  # v0.3, which has no window
    "qwen2.5-0.5b": _sizes(896, 4864, 24, 14, 2, vocab_size=151936, tied=True, family=Qwen2Spec),
    "qwen2.5-7b": _sizes(3584, 18944, 28, 28, 4, vocab_size=152064, family=Qwen2Spec),
    "qwen3-0.6b": _sizes(1024, 3072, 28, 16, 8, vocab_size=151936, tied=True, head_dim=128, family=Qwen3Spec),
    "qwen3-8b": _sizes(4096, 12288, 36, 32, 8, vocab_size=151936, head_dim=128, family=Qwen3Spec),
}
"""Sizes of Llama 2 where no other model is named."""


def read_model(name: str) -> ModelSpec:
    """A preset's sizes, or those of a config.json, its directory or a repository on the Hugging Face Hub."""
    if name in SPECS:
        return SPECS[name]
    path = fetched(os.path.expanduser(name), "config", "--model")
    if path.is_file():
        path = path.parent if path.name == "config.json" else path
    if path.is_dir():
        return read_spec(path)
    raise c.ConfigError(
        f"--model={name} is neither {', '.join(SPECS)} nor a config.json, its directory or OWNER/NAME on the Hub"
    )


RECIPE = Path(__file__).with_name("paper_7b")
"""The reproduction's YAML: in the project a link to examples/paper_7b, where they are edited; in a wheel, copies."""
NUM_DEMONSTRATIONS = 52_000
"""ShareGPT conversations of the paper."""
NUM_PREFERENCES = 160_800
"""Pairs of Anthropic's HH-RLHF, helpful and harmless, training split."""
SUPERVISED = {
    "sft": (c.SftConfig, NUM_DEMONSTRATIONS),
    "reward": (c.RewardConfig, NUM_PREFERENCES),
    "dpo": (c.DpoConfig, NUM_PREFERENCES),
}
"""Command -> its config class, and the rows of an epoch."""
PPO_RUNS = ("ppo_gil", "ppo_kl", "ppo")
PLANNED = ("run.dir=plan", "batch.micro_size=1", "parallel.tensor_size=1", "parallel.sequence_parallel=false")
"""Overrides for planning. The recipe leaves run.dir open; the others are chosen by the planner, and a recipe's own
values could be refused together with its choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeStage:
    """One training run of the reproduction."""

    command: str
    config: c.TrainConfig
    num_iterations: int


def ppo_config(overrides: Sequence[str] = (), run: str = "ppo_gil") -> c.PpoConfig:
    """The config of a PPO run of the reproduction, with overrides."""
    return load_config(c.PpoConfig, RECIPE / f"{run}.yaml", [*PLANNED, *overrides])


def recipe() -> dict[str, RecipeStage]:
    """Every training run, in their order."""
    stages = {}
    for name, (kind, num_rows) in SUPERVISED.items():
        config = load_config(kind, RECIPE / f"{name}.yaml", PLANNED)
        num_updates = config.train.epochs * num_rows // config.batch.global_size
        stages[name] = RecipeStage(command=name, config=config, num_iterations=num_updates)
    for name in PPO_RUNS:
        config = ppo_config(run=name)
        stages[name] = RecipeStage(command="ppo", config=config, num_iterations=config.ppo.iterations)
    return stages
