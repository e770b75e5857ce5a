"""The family's table of tensors against transformers' models and against the names of megatron-core's layers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_gil.models.families import Head, read_spec
from megatron_gil.models.hf import WeightMap
from tests.models.tiny import VARIANTS, make_model

HEADS: tuple[Head, ...] = ("lm", "score")


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", VARIANTS)
def test_the_table_lists_what_transformers_has(name: str, head: Head, tmp_path: Path) -> None:
    theirs = make_model(tmp_path, head=head, **VARIANTS[name])
    spec = read_spec(tmp_path)
    tensors = [tensor for _, tensor in spec.weights(head).hf_tensors(spec.num_layers)]
    expected = {name: tuple(parameter.shape) for name, parameter in theirs.named_parameters()}  # tied ones once
    assert {tensor.name: tensor.shape for tensor in tensors} == expected
    assert len(tensors) == len(expected)


def test_a_group_classifier_needs_two_groups(tmp_path: Path) -> None:
    make_model(tmp_path)
    spec = read_spec(tmp_path)
    shapes = {w.name: w.local_shape(2) for w in spec.weights("critic", num_groups=3).last}
    assert shapes == {"final_norm": (32,), "score": (1, 32), "group_head": (3, 32)}
    assert [w.name for w in spec.weights("critic", num_groups=1).last] == ["final_norm", "score"]


def test_transformer_engines_names_are_those_of_the_same_tensors(tmp_path: Path) -> None:
    """It cannot be built here: two layers' parameters under its names, of the second of two pipeline ranks."""
    make_model(tmp_path)
    shapes = {
        "self_attention.linear_qkv.layer_norm_weight": (32,),
        "self_attention.linear_qkv.weight": (64, 32),
        "self_attention.linear_proj.weight": (32, 32),
        "mlp.linear_fc1.layer_norm_weight": (32,),
        "mlp.linear_fc1.weight": (96, 32),
        "mlp.linear_fc2.weight": (32, 48),
    }
    parameters = [
        (f"decoder.layers.{i}.{name}", torch.zeros(shape)) for i in range(2) for name, shape in shapes.items()
    ]
    model: Any = SimpleNamespace(named_parameters=lambda: parameters)
    layout: Any = SimpleNamespace(pp_rank=1, pp_size=2, tp_rank=0, tp_size=1)
    found = {entry.param_name: entry.hf_names for entry in WeightMap(read_spec(tmp_path), model, layout).entries}
    assert found["decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"] == (
        "model.layers.2.input_layernorm.weight",
    )
    assert found["decoder.layers.1.mlp.linear_fc1.layer_norm_weight"] == (
        "model.layers.3.post_attention_layernorm.weight",
    )
    assert found["decoder.layers.1.self_attention.linear_qkv.weight"] == tuple(
        f"model.layers.3.self_attn.{name}_proj.weight" for name in "qkv"
    )
