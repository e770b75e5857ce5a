"""Llama 1 to 3.2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_gil.models.families.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaSpec(ModelSpec):
    model_type: ClassVar[str] = "llama"
    name: ClassVar[str] = "Llama"
    defaults: ClassVar[dict[str, Any]] = {"max_position_embeddings": 2048}

    def own_config(self) -> dict[str, Any]:
        return {"attention_bias": False, "mlp_bias": False}
