"""Mistral: Llama with a sliding window in every layer, where the config sets one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

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
        window = reader.window()
        every = "full_attention" if window is None else "sliding_attention"
        return reader.window_of(window, reader.get("layer_types") or [every], "layer_types")

    def own_config(self) -> dict[str, Any]:
        return {"sliding_window": self.window}
