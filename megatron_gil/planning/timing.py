"""Seconds of one iteration: estimates from sizes and the assumptions of hardware.py.

Two simplifications: every row is as long as the limits allow, and nothing overlaps. So the times are upper bounds, as
far as the assumptions hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_gil.planning.hardware import Assumptions, Gpu
from megatron_gil.planning.memory import Cut, SizedModel, num_parameters, received_weights
from megatron_gil.planning.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationTime:
    """Seconds."""

    rollout: float
    score: float
    update: float
    bubble: float
    """Share of the time of score and update in which a pipeline rank waits for others."""

    @property
    def total(self) -> float:
        return self.rollout + self.score + self.update


def iteration_time(workload: Workload, cut: Cut, gpu: Gpu, assume: Assumptions) -> IterationTime:
    num_microbatches = workload.num_microbatches(cut)
    score = update = rollout = 0.0
    rows = workload.rollout.num_rows if workload.rollout else workload.global_size
    passes = rows / cut.dp_size / workload.micro_size  # microbatches in one pass over all rows
    for model in workload.models:
        forward = _forward_time(model, workload, cut, gpu, assume)
        if workload.rollout or not model.trained:
            score += forward * (passes + cut.pp_size - 1)
        if model.trained:
            updates = workload.rollout.epochs * rows / workload.global_size if workload.rollout else 1
            # The backward pass takes twice as long as the forward one; recomputing is one more forward pass.
            factor = 4 if workload.precision.recompute == "full" else 3
            step = factor * forward * (num_microbatches + cut.pp_size - 1)
            update += updates * (step + _step_time(model, cut, gpu, assume))
    if workload.rollout:
        rollout = _rollout_time(workload, cut, gpu, assume)
    bubble = (cut.pp_size - 1) / (num_microbatches + cut.pp_size - 1)
    return IterationTime(rollout=rollout, score=score, update=update, bubble=bubble)


def decode_step_time(
    model: SizedModel, cut: Cut, num_rows: int, columns: float, gpu: Gpu, assume: Assumptions
) -> float:
    """Seconds to decode one token of every row of a rank. The time goes into reading every layer's weights and cache
    once. Only tensor parallelism makes a step shorter: pipeline ranks decode rows of their own."""
    spec = model.spec
    layer_params = (_parameters(model) - 2 * spec.vocab_size * spec.hidden_size) / spec.num_layers
    cache = 2 * num_rows * columns * spec.num_kv_heads * spec.head_dim * 2
    reading = (2 * layer_params + cache) / cut.tp_size / (assume.memory_share * gpu.memory_bandwidth)
    layer = max(assume.layer_launch_s, reading)
    if cut.tp_size > 1:
        layer += 2 * (assume.collective_s + 2 * num_rows * spec.hidden_size * 2 / assume.bandwidth(gpu, cut.tp_size))
    head = 2 * spec.vocab_size * spec.hidden_size / cut.tp_size / (assume.memory_share * gpu.memory_bandwidth)
    return spec.num_layers * layer + head


def checkpoint_bytes(workload: Workload) -> int:
    """Bytes of one checkpoint: weights, moments and master weights of all trained models."""
    size = workload.precision.dtype_bytes
    state = size + (12 if size == 2 else 8)
    return sum(state * _parameters(model) for model in workload.models if model.trained)


def _rollout_time(workload: Workload, cut: Cut, gpu: Gpu, assume: Assumptions) -> float:
    rollout, policy = workload.rollout, workload.models[0]
    assert rollout is not None
    decoded = workload.decoded_rows(cut)
    fillings = math.ceil(rollout.num_rows / (cut.dp_size * cut.pp_size) / decoded.num_rows)  # of the slots
    columns = rollout.prompt_tokens + rollout.new_tokens / 2
    step = decode_step_time(policy, cut, decoded.num_rows, columns, gpu, assume)
    flops = 2 * _parameters(policy) * decoded.num_rows * rollout.prompt_tokens
    prefill = flops / cut.tp_size / (assume.training_mfu * gpu.peak_flops)
    received = max(received_weights(policy, cut, pp_rank, workload.precision) for pp_rank in (0, cut.pp_size - 1))
    sharing = received / assume.bandwidth(gpu, cut.tp_size * cut.dp_size * cut.pp_size)
    return sharing + fillings * (prefill + rollout.new_tokens * step)


def _forward_time(model: SizedModel, workload: Workload, cut: Cut, gpu: Gpu, assume: Assumptions) -> float:
    """Seconds of one microbatch on one pipeline rank: 2 FLOPs for each parameter and token, plus two all-reduces a
    layer of tensor parallelism. Attention's own products, a few percent at these lengths, are left out."""
    spec, tokens = model.spec, workload.micro_size * workload.sequences_per_row * workload.num_tokens
    compute = 2 * _parameters(model) * tokens / (cut.tp_size * cut.pp_size) / (assume.training_mfu * gpu.peak_flops)
    if cut.tp_size == 1:
        return compute
    volume = 2 * (cut.tp_size - 1) / cut.tp_size * tokens * spec.hidden_size * workload.precision.dtype_bytes
    each = assume.collective_s + volume / assume.bandwidth(gpu, cut.tp_size)
    return compute + 2 * spec.num_layers / cut.pp_size * each


def _step_time(model: SizedModel, cut: Cut, gpu: Gpu, assume: Assumptions) -> float:
    """Seconds of one optimizer step: the float32 gradients are summed over data-parallel ranks, then Adam reads and
    writes some 28 bytes for each parameter."""
    count = max(num_parameters(model, cut, pp_rank) for pp_rank in (0, cut.pp_size - 1))
    shared = cut.dp_size if cut.distributed_optimizer else 1
    adam = 28 * count / shared / (assume.memory_share * gpu.memory_bandwidth)
    if cut.dp_size == 1:
        return adam
    volume = 2 * (cut.dp_size - 1) / cut.dp_size * 4 * count
    return adam + volume / assume.bandwidth(gpu, cut.tp_size * cut.dp_size)


def _parameters(model: SizedModel) -> int:
    return num_parameters(model, Cut(), 0)
