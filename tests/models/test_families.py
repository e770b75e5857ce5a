"""config.json as transformers 4 and 5 write it, what is refused, and the layouts a model fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_gil.config import ConfigError
from megatron_gil.models.families import ModelSpec, check_layout, read_spec
from megatron_gil.models.rope import rope_frequencies
from tests.models.tiny import LLAMA3_ROPE, SIZES

PLAIN: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES}
QWEN2: dict[str, Any] = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
QWEN3: dict[str, Any] = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
MISTRAL: dict[str, Any] = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
FULL, SLIDING = "full_attention", "sliding_attention"


def _read(tmp_path: Path, **changes: Any) -> ModelSpec:
    (tmp_path / "config.json").write_text(json.dumps({**PLAIN, **changes}))
    return read_spec(tmp_path)


def test_both_generations_of_transformers_say_the_same(tmp_path: Path) -> None:
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    old = _read(tmp_path, rope_theta=500000.0, rope_scaling=scaling)
    new = _read(tmp_path, rope_parameters={**LLAMA3_ROPE, "rope_theta": 500000.0})
    assert old == new
    assert (old.rope_theta, old.rope_scaling.factor, old.rope_scaling.original_max_positions) == (500000.0, 4.0, 16)  # type: ignore[union-attr]
    assert _read(tmp_path, rope_theta=500.0, rope_scaling=None) == _read(
        tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    )


@pytest.mark.parametrize("head", ["lm", "critic"])
def test_transformers_reads_what_we_write(head: Any, tmp_path: Path) -> None:
    spec = _read(tmp_path, rope_parameters=LLAMA3_ROPE, eos_token_id=[2, 5])
    written = spec.hf_config(head=head, num_groups=2, dtype=torch.bfloat16)
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert read_spec(tmp_path) == spec
    config: Any = LlamaConfig.from_pretrained(tmp_path)
    assert (config.hidden_size, config.head_dim, config.eos_token_id) == (32, 8, [2, 5])
    assert config.architectures == [{"lm": "LlamaForCausalLM", "critic": "LlamaForSequenceClassification"}[head]]
    theirs = LlamaRotaryEmbedding(config).inv_freq
    assert torch.equal(rope_frequencies(spec, torch.device("cpu")), theirs)


@pytest.mark.parametrize("rope", [LLAMA3_ROPE, {"rope_type": "default", "rope_theta": 500000.0}])
def test_rope_frequencies_equal_transformers_bit_for_bit(rope: dict[str, Any], tmp_path: Path) -> None:
    spec = _read(tmp_path, rope_parameters=rope, head_dim=64, hidden_size=256)
    config = LlamaConfig(**{**SIZES, "head_dim": 64, "hidden_size": 256}, rope_parameters=rope)  # type: ignore[arg-type]
    assert torch.equal(rope_frequencies(spec, torch.device("cpu")), LlamaRotaryEmbedding(config).inv_freq)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "mixtral"}, ["model_type", "'mixtral'", "'llama', 'mistral', 'qwen2', 'qwen3'"]),
        ({"model_type": "qwen3_moe"}, ["model_type", "'qwen3_moe'"]),
        ({"model_type": ["llama"]}, ["model_type"]),
        ({"model_type": "mistral"}, ["architectures", "'LlamaForCausalLM'", "MistralForCausalLM"]),
        (
            {**QWEN2, "architectures": ["Qwen2ForRewardModel"]},
            ["'Qwen2ForRewardModel'", "Qwen2ForSeq"],
        ),
        ({**QWEN2, "dual_chunk_attention_config": {"chunk_size": 8}}, ["dual_chunk_attention_config", "None"]),
        ({**QWEN2, "use_sliding_window": 1}, ["use_sliding_window", "1", "true or false"]),
        ({**QWEN2, "use_sliding_window": True, "sliding_window": 0}, ["sliding_window", "0"]),
        ({**QWEN2, "use_sliding_window": True, "max_window_layers": 2}, ["max_window_layers", f"{FULL} and {SLIDING}"]),
        ({**QWEN3, "use_sliding_window": True, "layer_types": [FULL, SLIDING] * 2}, ["layer_types", "in all layers"]),
        ({**QWEN3, "layer_types": [SLIDING] * 4}, ["layer_types", SLIDING, f"expected {FULL}"]),
        ({**QWEN3, "layer_types": "full"}, ["layer_types", "'full'"]),
        ({**QWEN3, "attention_bias": True}, ["attention_bias", "True", "Qwen3"]),
        ({**QWEN3, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["rope_type", "'yarn'"]),
        ({**MISTRAL, "sliding_window": "4096"}, ["sliding_window", "'4096'"]),
        ({**MISTRAL, "layer_types": [FULL, SLIDING]}, ["layer_types", f"{FULL} and {SLIDING}"]),
        (
            {**MISTRAL, "sliding_window": 5, "layer_types": [FULL] * 4},
            ["layer_types", FULL, "sliding_window=5", "null"],
        ),
        ({**QWEN3, "rope_parameters": {FULL: LLAMA3_ROPE}}, ["rope_parameters", FULL, "rope_type"]),
        (
            {"rope_parameters": LLAMA3_ROPE, "original_max_position_embeddings": 32},
            ["original_max_position_embeddings is 32", "16 in rope_parameters", "leave the first out"],
        ),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5", "1.0"]),
        ({"architectures": ["MixtralForCausalLM"]}, ["architectures", "MixtralForCausalLM", "LlamaForCausalLM"]),
        ({"attention_bias": True}, ["attention_bias", "True", "False"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "'silu'"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_type", "'linear'", "'llama3'"]),
        ({"rope_parameters": {**LLAMA3_ROPE, "factor": None}}, ["factor", "None"]),
        ({"hidden_size": "32"}, ["hidden_size", "'32'"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ({"eos_token_id": "</s>"}, ["eos_token_id"]),
    ],
)
def test_what_no_family_computes_is_refused(changes: dict[str, Any], parts: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        _read(tmp_path, **changes)
    message = str(raised.value)
    assert "\n" not in message
    assert all(part in message for part in [str(tmp_path / "config.json"), *parts]), message


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"sliding_window": 5}, None),  # a Llama has none
        ({**QWEN2, "sliding_window": 5}, None),
        ({**QWEN2, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}, 5),
        ({**QWEN2, "use_sliding_window": True, "max_window_layers": 0}, 4096),
        ({**QWEN2, "use_sliding_window": True, "sliding_window": 5}, None),  # of 4 layers, from the 28th on
        ({**QWEN2, "use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, None),
        ({**QWEN3, "use_sliding_window": True, "sliding_window": 5, "layer_types": [SLIDING] * 4}, 5),
        ({**QWEN3, "use_sliding_window": True, "sliding_window": 5, "layer_types": [FULL] * 4}, None),
        ({**MISTRAL, "sliding_window": 5}, 5),
        ({**MISTRAL, "sliding_window": None}, None),
        (MISTRAL, 4096),
    ],
)
def test_a_window_is_where_transformers_has_one(changes: dict[str, Any], window: int | None, tmp_path: Path) -> None:
    spec = _read(tmp_path, **changes)
    assert spec.window == window
    config: Any = AutoConfig.from_pretrained(tmp_path)
    types = getattr(config, "layer_types", None) or [FULL if config.model_type == "llama" else SLIDING]
    assert {config.sliding_window if each == SLIDING else None for each in types} == {window}


@pytest.mark.parametrize("family", [QWEN2, QWEN3, MISTRAL], ids=lambda family: family["model_type"])
def test_an_absent_key_means_what_it_means_in_transformers(family: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps({**family, **sizes, "vocab_size": 61}))
    spec, config = read_spec(tmp_path), AutoConfig.from_pretrained(tmp_path)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    theirs = (config.num_key_value_heads, head_dim, config.max_position_embeddings, config.rms_norm_eps)
    assert (spec.num_kv_heads, spec.head_dim, spec.max_positions, spec.norm_eps) == theirs


def test_a_missing_or_broken_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read"):
        read_spec(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: not valid JSON"):
        read_spec(tmp_path)


@pytest.mark.parametrize(
    ("changes", "layout", "parts"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 6}, (4, 1), ["num_attention_heads=6", "tensor_size=4", "3"]),
        ({}, (4, 1), ["num_key_value_heads=2", "tensor_size=4", "1, 2"]),
        ({"intermediate_size": 47}, (2, 1), ["intermediate_size=47", "tensor_size=2"]),
        ({}, (1, 5), ["num_hidden_layers=4", "pipeline_size=5", "at most 4"]),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(
    changes: dict[str, Any], layout: tuple[int, int], parts: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as raised:
        check_layout(_read(tmp_path, **changes), *layout, sequence_parallel=False)
    assert all(part in str(raised.value) for part in parts), raised.value


def test_a_layout_that_fits_is_taken_and_pads_the_vocabulary(tmp_path: Path) -> None:
    spec = _read(tmp_path)
    check_layout(spec, 2, 2, sequence_parallel=True)
    assert [spec.padded_vocab_size(n) for n in (1, 2, 4)] == [61, 62, 64]
    with pytest.raises(ConfigError, match="sequence_parallel"):
        check_layout(spec, 1, 1, sequence_parallel=True)


def test_layers_are_cut_into_ranks_that_differ_by_one_at_most(tmp_path: Path) -> None:
    for num_layers in range(1, 12):
        spec = _read(tmp_path, num_hidden_layers=num_layers)
        for pp_size in range(1, num_layers + 1):
            cut = [list(spec.layers_of(pp_rank, pp_size)) for pp_rank in range(pp_size)]
            assert [layer for layers in cut for layer in layers] == list(range(num_layers))
            sizes = [len(layers) for layers in cut]
            assert sizes == sorted(sizes, reverse=True)
            assert sizes[0] - sizes[-1] <= 1
