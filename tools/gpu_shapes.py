"""Llamas and workloads of `bench.py gpu`: sizes, the operations and bytes they cost, and what `plan` says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_gil import config as c
from megatron_gil.models.families import ModelSpec
from megatron_gil.planning.memory import OVERHEAD_BYTES, Cut, SizedModel, num_parameters
from megatron_gil.planning.presets import SPECS
from megatron_gil.planning.rank import rank_memory
from megatron_gil.planning.workload import read_workload

SHAPES = {name: SPECS[name] for name in ("160m", "1.3b", "3b")}
SHAPES["tiny"] = replace(  # for the script's own test
    SPECS["7b"], hidden_size=64, ffn_size=160, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=301
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Rows and lengths of the measurements, and how often each is taken."""

    rows: int = 32
    tokens: int = 1024
    """Of a row that is trained on or scored."""
    decoded_rows: int = 64
    prompt_tokens: int = 512
    new_tokens: int = 128
    prompts: int = 16
    responses_per_prompt: int = 2
    iteration_prompt_tokens: int = 256
    warm_up: int = 2
    repetitions: int = 5
    product_size: int = 8192
    """Rows and columns of the matrices whose product measures the device."""
    copy_bytes: int = 4 << 30


TINY_WORK = Work(
    rows=4,
    tokens=32,
    decoded_rows=4,
    prompt_tokens=12,
    new_tokens=6,
    prompts=2,
    responses_per_prompt=2,
    iteration_prompt_tokens=8,
    warm_up=1,
    repetitions=3,
    product_size=256,
    copy_bytes=1 << 22,
)


EASILY = 0.9
"""Of the device's memory: what a plan may need, so that its error does not end the measurement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A config that should fit, and the bytes that `plan` gives its tensors (without its OVERHEAD_BYTES)."""

    config: Any
    tensor_bytes: int


def plan_train(spec: ModelSpec, work: Work, memory_bytes: int) -> Plan | None:
    """SFT with the largest microbatch that fits; None where none does."""

    def config(micro_size: int, recompute: Any) -> c.SftConfig:
        return c.SftConfig(
            run=c.TrainingRunSection(dir="unused"),
            models=c.ModelsSection(dtype="bfloat16", recompute=recompute),
            data=c.DataSection(max_tokens=work.tokens),
            batch=c.BatchSection(global_size=work.rows, micro_size=micro_size),
            optimizer=c.OptimizerSection(lr=1e-6),
        )

    return _choose("sft", {"policy": spec}, config, work.rows, memory_bytes)


def plan_iteration(spec: ModelSpec, work: Work, memory_bytes: int) -> Plan | None:
    """PPO-GIL with four models of this size, and both updates in every iteration."""
    rows = work.prompts * work.responses_per_prompt

    def config(micro_size: int, recompute: Any) -> c.PpoConfig:
        optimizer = c.OptimizerSection(lr=1e-6)
        return c.PpoConfig(
            run=c.TrainingRunSection(dir="unused"),
            models=c.ModelsSection(dtype="bfloat16", recompute=recompute),
            data=c.DataSection(max_prompt_tokens=work.iteration_prompt_tokens),
            batch=c.BatchSection(global_size=rows, micro_size=micro_size),
            optimizer=optimizer,
            critic_optimizer=optimizer,
            sampling=c.SamplingSection(max_new_tokens=work.new_tokens, micro_size=rows),
            ppo=c.PpoSection(prompts=work.prompts, responses_per_prompt=work.responses_per_prompt),
            gil=c.GilSection(warmup_updates=0, ramp_updates=0),
        )

    roles: list[str] = ["policy", "ref_policy", "critic", "reward_model"]
    return _choose("ppo", dict.fromkeys(roles, spec), config, rows, memory_bytes)


def _choose(
    command: str, specs: dict[str, ModelSpec], config: Callable[[int, Any], Any], rows: int, memory_bytes: int
) -> Plan | None:
    """The largest microbatch that fits easily, without recomputation where that goes; else what needs least."""
    plans = []
    for recompute in ("none", "full"):
        for micro_size in _halves(min(rows, 16)):
            tried = config(micro_size, recompute)
            peak = rank_memory(read_workload(tried, lambda role: specs[role]), Cut(), 0).peak
            plans.append(Plan(config=tried, tensor_bytes=peak - OVERHEAD_BYTES))
    within = [plan for plan in plans if plan.tensor_bytes + OVERHEAD_BYTES <= memory_bytes]
    easily = [plan for plan in within if plan.tensor_bytes + OVERHEAD_BYTES <= EASILY * memory_bytes]
    return easily[0] if easily else min(within, key=lambda plan: plan.tensor_bytes, default=None)


def _halves(size: int) -> Iterator[int]:
    while size:
        yield size
        size //= 2


def forward_flops(spec: ModelSpec, num_tokens: int) -> float:
    """Of one token in a row of `num_tokens`: 2 for each weight that it is multiplied with, the head's among them, the
    embedding's not; and causal attention's two products, each over half the row on average."""
    weights = num_parameters(_use(spec), Cut(), 0) - spec.vocab_size * spec.hidden_size * (not spec.tied)
    return 2 * weights + 2 * spec.num_layers * spec.num_heads * spec.head_dim * num_tokens


def decoding_bytes(spec: ModelSpec, num_rows: int, num_columns: float) -> float:
    """What one decoding step must read in bfloat16: every weight but the embedding, and the key-value cache."""
    cache = 2 * spec.num_layers * num_rows * num_columns * spec.num_kv_heads * spec.head_dim
    return 2 * (forward_flops(spec, 0) / 2 + cache)


def _use(spec: ModelSpec) -> SizedModel:
    return SizedModel(role="policy", spec=spec, head="lm", trained=False)
