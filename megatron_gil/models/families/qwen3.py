"""Qwen3: every query and key head is normalised before it is rotated; a head's size is its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_gil.models.families.qwen2 import Qwen2Spec
from megatron_gil.models.families.tensors import plain_layer, query_key_norms
from megatron_gil.models.weight_table import Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3Spec(Qwen2Spec):
    """Windows as Qwen2's."""

    model_type: ClassVar[str] = "qwen3"
    name: ClassVar[str] = "Qwen3"
    defaults: ClassVar[Mapping[str, Any]] = {**Qwen2Spec.defaults, "head_dim": 128}

    def layer_weights(self) -> tuple[Weight, ...]:
        return (*plain_layer(self), *query_key_norms(self))

    def own_config(self) -> dict[str, Any]:
        return {**Qwen2Spec.own_config(self), "attention_bias": False}
