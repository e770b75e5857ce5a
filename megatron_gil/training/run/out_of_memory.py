"""Out of memory, said so that the reader knows what to change."""

from __future__ import annotations

from typing import Any

import torch

from megatron_gil.config import TrainConfig
from megatron_gil.training.run.progress import Progress

_SIGNS = (
    "DefaultCPUAllocator",  # torch's, on the CPU
    "CUBLAS_STATUS_ALLOC_FAILED",  # cuBLAS finds no room for its workspace
    "CUDA error: out of memory",  # of what does not pass through torch's allocator
    "CUDA out of memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Of the GPU, of Python, or of what raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in _SIGNS)


def explain_out_of_memory(error: BaseException, progress: Progress, config: Any) -> str:
    """One line: the phase, its rows and lengths, and the key to lower."""
    phase, shape = progress.where.phase, progress.shape
    text = f"out of memory in {phase}"
    if shape:
        rows, width = shape[0] * (shape[1] if len(shape) == 3 else 1), shape[-1]
        text += f", {rows} rows of up to {width} tokens"
    if phase in ("rollout", "evaluation") and hasattr(config, "sampling"):
        sampling = config.sampling
        size = "" if sampling.micro_size is None else f"={sampling.micro_size}"
        text += f" and {sampling.max_new_tokens} new ones; lower sampling.micro_size{size}"
        text += " or sampling.max_new_tokens"
        text += ", or set models.offload=rollout" if _leaves(config, "none", "frozen") else ""
    elif shape:
        batch = config.batch
        key = "micro_size" if batch.micro_tokens is None else "micro_tokens"
        text += f"; lower batch.{key}={getattr(batch, key)}, set models.recompute=full"
        text += " or models.offload=all" if _leaves(config, "none", "frozen", "rollout") else ""
        text += " or raise parallel.tensor_size"
    else:
        text += "; raise parallel.tensor_size or parallel.pipeline_size, or give the process more memory"
    return f"{text} ({' '.join(str(error).split())[:200]})"


def _leaves(config: Any, *offloads: str) -> bool:
    """Whether more of a training run could wait on the host."""
    return isinstance(config, TrainConfig) and config.models.offload in offloads
