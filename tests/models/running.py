"""What ranks run in this folder's tests: one model through megatron-core's schedule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_gil.config import ModelsSection, ParallelSection
from megatron_gil.models.families import Head, ModelSpec, read_spec
from megatron_gil.models.heads import ScalarHead, output_weight
from megatron_gil.models.hf import load_weights
from megatron_gil.models.transformer import build_model
from megatron_gil.parallel.layout import ParallelLayout, start_parallel, stop_parallel

LAYOUTS = [
    {"tensor_size": 1, "pipeline_size": 1},
    {"tensor_size": 2, "pipeline_size": 1},
    {"tensor_size": 1, "pipeline_size": 2},
    {"tensor_size": 2, "pipeline_size": 2},
    {"tensor_size": 2, "pipeline_size": 1, "sequence_parallel": True},
    {"tensor_size": 2, "pipeline_size": 2, "sequence_parallel": True},
    {"tensor_size": 1, "pipeline_size": 3},  # of 4 layers: two, one and one
]


def layout_name(layout: dict[str, Any]) -> str:
    suffix = "_sp" if layout.get("sequence_parallel") else ""
    return f"tp{layout['tensor_size']}_pp{layout['pipeline_size']}{suffix}"


def world_size(layout: dict[str, Any]) -> int:
    return layout["tensor_size"] * layout["pipeline_size"]


@contextmanager
def parallel(layout: dict[str, Any]) -> Iterator[ParallelLayout]:
    started = start_parallel(ParallelSection(**layout, timeout_s=600.0), seed=5)
    try:
        yield started
    finally:
        stop_parallel()


def load_model(
    hf_dir: Path,
    layout: ParallelLayout,
    head: Head = "lm",
    num_groups: int = 0,
    dtype: torch.dtype = torch.float32,
    recompute: Any = "none",
) -> tuple[ModelSpec, Any]:
    spec = read_spec(hf_dir)
    model = build_model(
        spec, layout, head=head, num_groups=num_groups, dtype=dtype, models=ModelsSection(recompute=recompute)
    )
    load_weights(model, spec, hf_dir, layout)
    return spec, model


def forward(model: Any, tokens: Tensor) -> Tensor | None:
    """The model's output on the last pipeline stage, from two microbatches of other lengths; None elsewhere."""
    halves = [tokens[:1, :-4], tokens[1:]]
    outputs = _run(model, halves, forward_only=True)
    return outputs[1] if outputs else None


def gradients(model: Any, tokens: Tensor, direction: Tensor, offset: int = 0) -> dict[str, Tensor]:
    """Of sum(output[..., columns] * direction) over all rows and positions, per parameter of this rank.

    offset: where this rank's columns of the output begin in `direction`; beyond its end the direction is zero.
    """
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    model.config.finalize_model_grads_func = finalize_model_grads
    ddp.zero_grad_buffer()
    _run(ddp, [tokens[:1], tokens[1:]], forward_only=False, direction=direction, offset=offset)
    return {name: parameter.main_grad for name, parameter in model.named_parameters()}


def _all_outputs(model: Any, hidden: Tensor) -> Tensor:
    """[N, V / tp] logits, or [N, 1 + M], of every position."""
    head, pg = model.output_layer, model.pg_collection.tp
    is_lm = not isinstance(head, ScalarHead)
    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=is_lm, group=pg)
    elif is_lm and pg.size() > 1:
        hidden = copy_to_tensor_model_parallel_region(hidden, group=pg)
    if is_lm:
        return hidden @ output_weight(model).T
    return torch.cat([part(hidden) for part in (head.score, head.group_head) if part is not None], dim=-1)


def _run(
    model: Any, batches: list[Tensor], *, forward_only: bool, direction: Tensor | None = None, offset: int = 0
) -> list[Any]:
    def forward_step(iterator: Iterator[Tensor], module: Any) -> Any:
        tokens = next(iterator)
        packed = tokens.reshape(1, -1)
        output = module(packed, packed, torch.arange(tokens.numel()).view(tokens.shape))

        def read(hidden: Tensor, non_loss_data: bool = False) -> Any:
            output = _all_outputs(getattr(module, "module", module), hidden[0]).unflatten(0, tokens.shape)
            if direction is None:
                return output
            columns = direction[offset : offset + output.shape[-1]]
            # A count of one over all microbatches: the gradient is that of the plain sum.
            count = int(tokens is batches[0])
            return (output[..., : len(columns)] * columns).sum(), torch.tensor(count, dtype=torch.int), {}

        return output, read

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=max(batch.shape[1] for batch in batches),
        micro_batch_size=max(len(batch) for batch in batches),
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
