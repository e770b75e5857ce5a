"""Sizes of Llama 2 and of Llama 3 8B, and the reproduction's recipe (examples/paper_7b holds the same numbers; a test
compares them)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_gil import config as c
from megatron_gil.config.files import load_config
from megatron_gil.models.llama import LlamaSpec, read_config


def _llama2(hidden_size: int, ffn_size: int, num_layers: int, num_heads: int, num_kv_heads: int) -> LlamaSpec:
    return LlamaSpec(
        hidden_size=hidden_size,
        ffn_size=ffn_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=hidden_size // num_heads,
        vocab_size=32000,
        max_positions=4096,
        norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        tied=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )


LLAMA3_8B = replace(
    _llama2(4096, 14336, 32, 32, 8),
    vocab_size=128256,
    max_positions=8192,
    rope_theta=500000.0,
    bos_token_id=128000,
    eos_token_id=128001,
)
SPECS = {
    "7b": _llama2(4096, 11008, 32, 32, 32),
    "8b": LLAMA3_8B,
    "13b": _llama2(5120, 13824, 40, 40, 40),
    "70b": _llama2(8192, 28672, 80, 64, 8),
}


def read_model(name: str) -> LlamaSpec:
    """A preset's sizes, or those of a config.json or its directory."""
    if name in SPECS:
        return SPECS[name]
    path = Path(os.path.expanduser(name))
    if path.is_file():
        path = path.parent if path.name == "config.json" else path
    if path.is_dir():
        return LlamaSpec.from_config(read_config(path), source=str(path / "config.json"))
    raise c.ConfigError(f"--model {name} is neither {', '.join(SPECS)} nor a config.json or its directory")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeStage:
    """One training run of the reproduction."""

    command: str
    config: c.TrainConfig
    num_iterations: int


NUM_DEMONSTRATIONS = 52_000
"""ShareGPT conversations of the paper."""
NUM_PREFERENCES = 160_800
"""Pairs of Anthropic's HH-RLHF, helpful and harmless, training split."""
PPO_RUNS = ("ppo_gil", "ppo_kl", "ppo")


PPO_SETTINGS = (
    "run.dir=plan",
    "models.dtype=bfloat16",
    "data.max_prompt_tokens=512",
    "batch.global_size=32",
    "batch.micro_size=1",
    "sampling.max_new_tokens=512",
    "sampling.micro_size=32",
    "ppo.iterations=2000",
    "ppo.prompts=32",
    "ppo.responses_per_prompt=4",
)
"""Sizes of the PPO runs; batch.micro_size is the planner's to choose."""


def ppo_config(overrides: Sequence[str] = ()) -> c.PpoConfig:
    return load_config(c.PpoConfig, None, [*PPO_SETTINGS, *overrides])


def recipe() -> dict[str, RecipeStage]:
    """Every training run, in their order; one epoch each of SFT, reward model and DPO in batches of 32."""
    sizes: dict[str, int] = {"sft": 2048, "reward": 1024, "dpo": 1024}
    kinds = {"sft": c.SftConfig, "reward": c.RewardConfig, "dpo": c.DpoConfig}
    stages = {}
    for name, max_tokens in sizes.items():
        config = kinds[name](
            run=c.TrainingRunSection(dir="plan"),
            models=c.ModelsSection(dtype="bfloat16"),
            data=c.DataSection(max_prompt_tokens=max_tokens // 2, max_tokens=max_tokens),
            batch=c.BatchSection(global_size=32, micro_size=1),
        )
        rows = NUM_DEMONSTRATIONS if name == "sft" else NUM_PREFERENCES
        stages[name] = RecipeStage(command=name, config=config, num_iterations=rows // 32)
    for name in PPO_RUNS:
        config = ppo_config()
        stages[name] = RecipeStage(command="ppo", config=config, num_iterations=config.ppo.iterations)
    return stages
