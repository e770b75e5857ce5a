"""The model families, one file each. The rest of the program asks a spec for its sizes and for its `weights`, the table
of its tensors, and names neither a family nor a layer's tensors itself. Does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_gil.config import ConfigError
from megatron_gil.models.families.config_reader import read_config
from megatron_gil.models.families.llama import LlamaSpec
from megatron_gil.models.families.mistral import MistralSpec
from megatron_gil.models.families.qwen2 import Qwen2Spec
from megatron_gil.models.families.qwen3 import Qwen3Spec
from megatron_gil.models.families.spec import Head, Llama3Scaling, ModelSpec, TokenIds, check_layout

__all__ = [
    "FAMILIES",
    "Head",
    "Llama3Scaling",
    "LlamaSpec",
    "MistralSpec",
    "ModelSpec",
    "Qwen2Spec",
    "Qwen3Spec",
    "TokenIds",
    "check_layout",
    "read_config",
    "read_spec",
    "spec_from_config",
]

FAMILIES: dict[str, type[ModelSpec]] = {
    family.model_type: family for family in (LlamaSpec, MistralSpec, Qwen2Spec, Qwen3Spec)
}
"""By config.json's model_type."""


def read_spec(hf_dir: Path) -> ModelSpec:
    """From config.json as transformers 4 or 5 writes it; ConfigError for what no family here computes."""
    return spec_from_config(read_config(hf_dir), source=str(Path(hf_dir) / "config.json"))


def spec_from_config(raw: Any, source: str) -> ModelSpec:
    """From what config.json holds. source: its name in messages."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: must hold a JSON object, found {type(raw).__name__}")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(map(repr, FAMILIES))
        raise ConfigError(
            f"{source}: model_type is {model_type!r}, expected one of {known}: no other model is supported"
        )
    return FAMILIES[model_type].from_config(raw, source)
