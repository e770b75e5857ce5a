"""Which kernels a model runs on, decided once from what imports here and what the config asks for."""

from __future__ import annotations

import importlib
import os
import shutil
from dataclasses import dataclass
from typing import Any, Self

import torch
from megatron.core import __version__ as core_version
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel import layers as tp_layers

from megatron_gil.config import ConfigError, ModelsSection


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """What one model runs on; `fusions` are megatron-core's, each of which needs a library."""

    transformer_engine: bool
    """Transformer Engine's linear layers, with the norms inside them; False: megatron-core's own."""
    swiglu_fusion: bool
    """SwiGLU compiled to one kernel; needs Triton and a C compiler, which Triton calls."""
    gradient_accumulation_fusion: bool
    """A weight's gradient is added to its buffer by the matrix product itself; needs Apex."""

    @classmethod
    def choose(cls, models: ModelsSection, device: torch.device) -> Self:
        """ConfigError where the config asks for what is not here."""
        # megatron-core's own flags: each says that the library was imported, not only that it could be found.
        has_engine = device.type == "cuda" and gpt_layer_specs.HAVE_TE
        if models.layer == "transformer_engine" and not has_engine:
            raise ConfigError(
                "models.layer=transformer_engine needs a GPU and a transformer-engine that megatron-core "
                f"{core_version} can import (docs/gpu.md); install it or use models.layer=auto"
            )
        fuse = device.type == "cuda" and models.fusions == "auto"
        return cls(
            transformer_engine=has_engine and models.layer != "local",
            swiglu_fusion=fuse and _compiles(),
            gradient_accumulation_fusion=fuse and tp_layers._grad_accum_fusion_available,
        )

    def describe(self) -> str:
        """For the first lines of a run."""
        on = {
            "swiglu": self.swiglu_fusion,
            "gradient accumulation": self.gradient_accumulation_fusion,
        }
        layer = "Transformer Engine" if self.transformer_engine else "megatron-core"
        return f"{layer} layers; fused: {', '.join(name for name, is_on in on.items() if is_on) or 'nothing'}"


def _compiles() -> bool:
    """Whether torch.compile can make a CUDA kernel here."""
    try:
        importlib.import_module("triton")
    except ImportError:
        return False
    return any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))


def attention_backend(dtype: torch.dtype, *, num_heads: int, num_kv_heads: int, head_dim: int, device: Any) -> str:
    """Which of torch's attention kernels models/attention.py gets in training."""
    if device.type != "cuda":
        return "torch on the CPU"
    fold = expands_kv_heads(dtype, num_heads, num_kv_heads)
    shapes = [(1, heads, 128, head_dim) for heads in (num_heads, *([num_heads if fold else num_kv_heads] * 2))]
    query, key, value = (torch.empty(shape, dtype=dtype, device=device) for shape in shapes)
    asked = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, True, not fold and num_heads != num_kv_heads)
    if torch.backends.cuda.can_use_flash_attention(asked):
        return "flash"
    return "memory-efficient" if torch.backends.cuda.can_use_efficient_attention(asked) else "math (slow)"


def expands_kv_heads(dtype: torch.dtype, num_heads: int, num_kv_heads: int, *, masked: bool = False) -> bool:
    """Whether keys and values are repeated for every query head before attention.

    torch's flash kernel takes grouped queries as they are, but no float32 and no mask; its memory-efficient kernel
    takes both, but not grouped queries, and what neither takes goes to the math kernel, which stores all scores.
    """
    return num_heads != num_kv_heads and (masked or dtype not in (torch.float16, torch.bfloat16))
