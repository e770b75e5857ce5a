"""The one place that builds a GPTModel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from megatron_gil.config import ModelsSection
from megatron_gil.models.attention import RowAttention, RowLayout
from megatron_gil.models.families import Head, ModelSpec, check_layout
from megatron_gil.models.heads import ScalarHead, hand_on
from megatron_gil.models.hf import WeightMap
from megatron_gil.models.kernels import Kernels
from megatron_gil.models.norm import RMSNorm
from megatron_gil.models.rope import rope_frequencies
from megatron_gil.parallel.layout import ParallelLayout


def build_model(
    spec: ModelSpec,
    layout: ParallelLayout,
    *,
    head: Head,
    num_groups: int = 0,
    dtype: torch.dtype,
    models: ModelsSection | None = None,
) -> GPTModel:
    """This pipeline stage of the model, its weights not yet set (`load_weights` sets them).

    model(tokens [1, N], position ids that nobody reads, places [R, W]) takes the packed rows of engine/packing.py; the
    result is the hidden states, [1, N, H] on the last stage (N / tp under sequence parallelism), from which
    engine/readout.py reads, and [N, 1, H] on the others. `models` says which kernels and what is recomputed; its dtype
    is not read.
    """
    models = models or ModelsSection()
    check_layout(spec, layout.tp_size, layout.pp_size, layout.sequence_parallel)
    kernels = Kernels.choose(models, layout.device)
    config = _transformer_config(spec, layout, dtype, models.recompute, kernels)
    model: Any = GPTModel(
        config,
        _layer_specs(kernels, spec, layout),
        vocab_size=spec.padded_vocab_size(layout.tp_size),
        max_sequence_length=spec.max_positions,
        pre_process=layout.is_first_pp_stage,
        post_process=layout.is_last_pp_stage,
        share_embeddings_and_output_weights=spec.tied and head == "lm",
        position_embedding_type="none",  # positions begin anew with every row: models/attention.py rotates
    )
    if layout.is_first_pp_stage:
        model.embedding.register_forward_hook(_with_plain_strides)
    if layout.is_last_pp_stage and head == "lm":
        model.output_layer.forward = hand_on
    elif layout.is_last_pp_stage:
        groups = num_groups if head == "critic" else 0
        model.output_layer = ScalarHead(spec.hidden_size, groups, dtype, layout.device)
    model.to(layout.device)  # megatron's layers lie there already; whatever a module makes by itself does not
    _mark_sharded_parameters(WeightMap(spec, model, layout))
    return model


def _with_plain_strides(module: torch.nn.Module, inputs: Any, hidden: Tensor) -> Tensor:
    """[N, 1, H] as it lies in memory. The embedding transposes [1, N, H]; from the strides that this leaves,
    torch.matmul concludes that it must multiply row by row."""
    return hidden.flatten(0, 1).unsqueeze(1)


def _mark_sharded_parameters(weights: WeightMap) -> None:
    """Mark the parameters of which each tensor-parallel rank holds a part. An unmarked one is taken for one that all
    ranks hold alike, and counts in the gradient norm on the first rank only. megatron's layers set the mark only when
    they draw their own weights."""
    for entry in weights.entries:
        parameter: Any = weights.model.get_parameter(entry.param_name)
        parameter.tensor_model_parallel = entry.weight.shard_dim is not None


def _transformer_config(
    spec: ModelSpec, layout: ParallelLayout, dtype: torch.dtype, recompute: str, kernels: Kernels
) -> TransformerConfig:
    """One per model: the config carries the hooks of the schedule and the optimizer."""
    parts = {weight.name for weight in spec.layer_weights()}
    return TransformerConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.ffn_size,
        num_attention_heads=spec.num_heads,
        num_query_groups=spec.num_kv_heads,
        kv_channels=spec.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=spec.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias="qkv_bias" in parts,
        qk_layernorm="query_norm" in parts,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        tensor_model_parallel_size=layout.tp_size,
        pipeline_model_parallel_size=layout.pp_size,
        sequence_parallel=layout.sequence_parallel,
        variable_seq_lengths=True,  # the number of tokens differs from microbatch to microbatch
        moe_token_dispatcher_type="alltoall",  # the default refuses variable lengths, experts or not
        cuda_graph_scope=[],  # the default warns that it is deprecated
        calculate_per_token_loss=True,  # losses are sums, divided once by the global count
        perform_initialization=False,  # weights are loaded
        deterministic_mode=layout.deterministic,  # the embedding's gradient; parallel/device.py does the rest
        gradient_accumulation_fusion=kernels.gradient_accumulation_fusion,
        bias_activation_fusion=kernels.swiglu_fusion,
        masked_softmax_fusion=False,  # for megatron's own attention, which is not used
        bias_dropout_fusion=False,  # there is neither bias nor dropout
        **_recompute_options(recompute),
        **_pipeline_options(spec, layout.pp_size),
    )


def _pipeline_options(spec: ModelSpec, pp_size: int) -> dict[str, Any]:
    """megatron-core divides layers evenly unless told what lies where."""
    if spec.num_layers % pp_size == 0:
        return {}
    ranks = [["decoder"] * len(spec.layers_of(pp_rank, pp_size)) for pp_rank in range(pp_size)]
    return {"pipeline_model_parallel_layout": [["embedding", *ranks[0]], *ranks[1:-1], [*ranks[-1], "loss"]]}


def _recompute_options(recompute: str) -> dict[str, Any]:
    if recompute == "none":
        return {}
    if recompute == "selective":
        return {"recompute_granularity": "selective"}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def _layer_specs(kernels: Kernels, model: ModelSpec, layout: ParallelLayout) -> Any:
    spec: Any
    if kernels.transformer_engine:
        spec = get_gpt_layer_with_transformer_engine_spec()  # its norms are part of the linear layers after them
    else:
        spec = get_gpt_layer_local_spec()
        spec.submodules.input_layernorm = RMSNorm
        spec.submodules.pre_mlp_layernorm = RMSNorm
    if "query_norm" in {weight.name for weight in model.layer_weights()}:
        spec.submodules.self_attention.submodules.q_layernorm = RMSNorm
        spec.submodules.self_attention.submodules.k_layernorm = RMSNorm
    rows = RowLayout(rope_frequencies(model, layout.device), model.window)
    attention = ModuleSpec(module=RowAttention, params={"layout": rows})
    spec.submodules.self_attention.submodules.core_attention = attention
    num_layers = len(model.layers_of(layout.pp_rank, layout.pp_size))
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=ModuleSpec(module=RMSNorm))
