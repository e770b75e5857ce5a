"""Rotary position embedding: Llama's frequencies, Llama 3.1's stretching of them included."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_gil.models.families import Llama3Scaling, ModelSpec


def rope_frequencies(spec: ModelSpec, device: torch.device) -> Tensor:
    """[head_dim / 2] radians per position, float32 whatever the model's dtype; made on the CPU, equal everywhere."""
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
    frequencies = 1.0 / (spec.rope_theta**exponents)
    if spec.rope_scaling is not None:
        frequencies = _stretch(frequencies, spec.rope_scaling)
    return frequencies.to(device)


def _stretch(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Divides low frequencies by the factor, keeps high ones and blends between; the order of operations is
    transformers', for equal bits. megatron's own flag has Llama 3.1's numbers built in."""
    wavelengths = 2 * math.pi / frequencies
    longest = scaling.original_max_positions / scaling.low_freq_factor
    shortest = scaling.original_max_positions / scaling.high_freq_factor
    divided = torch.where(wavelengths > longest, frequencies / scaling.factor, frequencies)
    share = (scaling.original_max_positions / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - share) * divided / scaling.factor + share * divided
    between = (wavelengths >= shortest) & (wavelengths <= longest)
    return torch.where(between, blended, divided)
