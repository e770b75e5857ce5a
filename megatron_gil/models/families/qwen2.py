"""Qwen2 and Qwen2.5: queries, keys and values have a bias; with use_sliding_window, a window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_gil.models.families.config_reader import ConfigReader
from megatron_gil.models.families.spec import ModelSpec
from megatron_gil.models.families.tensors import plain_layer, qkv_bias
from megatron_gil.models.weight_table import Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen2Spec(ModelSpec):
    model_type: ClassVar[str] = "qwen2"
    name: ClassVar[str] = "Qwen2"
    defaults: ClassVar[Mapping[str, Any]] = {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
    }

    def layer_weights(self) -> tuple[Weight, ...]:
        return (*plain_layer(self), qkv_bias(self))

    @classmethod
    def read_window(cls, reader: ConfigReader, num_layers: int) -> int | None:
        """transformers' rule: layer_types says which layers have it, or else those from max_window_layers on have."""
        window = reader.window() if reader.flag("use_sliding_window") else None
        key, types = "layer_types", reader.get("layer_types")
        if types is None:
            key, first = "max_window_layers", reader.size("max_window_layers", least=0)
            slides = [window is not None and layer >= first for layer in range(num_layers)]
            types = ["sliding_attention" if each else "full_attention" for each in slides]
        return reader.window_of(window, types, key)

    def own_config(self) -> dict[str, Any]:
        return {
            "use_sliding_window": self.window is not None,
            "sliding_window": self.window,
            "max_window_layers": self.num_layers if self.window is None else 0,
        }
