"""Mistral: Llama with a sliding window in every layer, where the config sets one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_gil.config import ConfigError
from megatron_gil.models.families.config_reader import ConfigReader
from megatron_gil.models.families.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class MistralSpec(ModelSpec):
    model_type: ClassVar[str] = "mistral"
    name: ClassVar[str] = "Mistral"
    defaults: ClassVar[Mapping[str, Any]] = {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    }

    @classmethod
    def read_window(cls, reader: ConfigReader, num_layers: int) -> int | None:
        """transformers looks at sliding_window alone, so layer_types must say the same."""
        window, types = reader.window(), reader.get("layer_types")
        if types and reader.window_of(window, types, "layer_types") != window:
            raise ConfigError(
                f"{reader.source}: layer_types asks for full_attention, and sliding_window={window} for a window in "
                "every layer; set sliding_window to null, or leave layer_types out"
            )
        return window

    def own_config(self) -> dict[str, Any]:
        return {"sliding_window": self.window}
