"""Llama's tensors: the one list of them."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from megatron_gil.models.weight_table import (
    EMBEDDING,
    GROUP_HEAD,
    LM_HEAD,
    SCORE_HEAD,
    HfTensor,
    Weight,
    WeightTable,
)

if TYPE_CHECKING:
    from megatron_gil.models.llama.spec import Head, LlamaSpec


@cache  # a plan asks for it thousands of times
def llama_weights(spec: LlamaSpec, head: Head, num_groups: int) -> WeightTable:
    """num_groups: a critic with more than one has a group classifier beside its value head."""
    embedding = HfTensor(EMBEDDING, (spec.vocab_size, spec.hidden_size))
    names = ("embedding.word_embeddings.weight",)
    return WeightTable(
        first=(Weight(name="embedding", param_names=names, parts=(embedding,), shard_dim=0),),
        layer=_layer(spec),
        last=(
            Weight(
                name="final_norm",
                param_names=("decoder.final_layernorm.weight",),
                parts=(HfTensor("model.norm.weight", (spec.hidden_size,)),),
                shard_dim=None,
            ),
            *(_lm_head(spec, embedding) if head == "lm" else _scalar_heads(spec, num_groups)),
        ),
    )


def _layer(spec: LlamaSpec) -> tuple[Weight, ...]:
    hidden, ffn = spec.hidden_size, spec.ffn_size
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim

    def hf(name: str, *shape: int) -> HfTensor:
        return HfTensor(f"model.layers.{{layer}}.{name}.weight", shape)

    def megatron(*names: str) -> tuple[str, ...]:
        return tuple(f"decoder.layers.{{layer}}.{name}" for name in names)

    return (
        Weight(
            name="attention_norm",
            param_names=megatron("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
            parts=(hf("input_layernorm", hidden),),
            shard_dim=None,
        ),
        Weight(
            name="qkv",
            param_names=megatron("self_attention.linear_qkv.weight"),
            parts=(
                hf("self_attn.q_proj", queries, hidden),
                hf("self_attn.k_proj", keys, hidden),
                hf("self_attn.v_proj", keys, hidden),
            ),
            shard_dim=0,
            num_blocks=spec.num_kv_heads,  # megatron keeps a key-value head behind the query heads that read it
        ),
        Weight(
            name="proj",
            param_names=megatron("self_attention.linear_proj.weight"),
            parts=(hf("self_attn.o_proj", hidden, queries),),
            shard_dim=1,
        ),
        Weight(
            name="mlp_norm",
            param_names=megatron("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
            parts=(hf("post_attention_layernorm", hidden),),
            shard_dim=None,
        ),
        Weight(
            name="gate_up",
            param_names=megatron("mlp.linear_fc1.weight"),
            parts=(hf("mlp.gate_proj", ffn, hidden), hf("mlp.up_proj", ffn, hidden)),
            shard_dim=0,
        ),
        Weight(
            name="down",
            param_names=megatron("mlp.linear_fc2.weight"),
            parts=(hf("mlp.down_proj", hidden, ffn),),
            shard_dim=1,
        ),
    )


def _lm_head(spec: LlamaSpec, embedding: HfTensor) -> tuple[Weight]:
    part = embedding if spec.tied else HfTensor(LM_HEAD, embedding.shape)
    names = ("output_layer.weight",)
    return (Weight(name="head", param_names=names, parts=(part,), shard_dim=0, is_copy=spec.tied),)


def _scalar_heads(spec: LlamaSpec, num_groups: int) -> tuple[Weight, ...]:
    """Of models/heads.py."""

    def head(name: str, hf_name: str, num_rows: int) -> Weight:
        names, part = (f"output_layer.{name}.weight",), HfTensor(hf_name, (num_rows, spec.hidden_size))
        return Weight(name=name, param_names=names, parts=(part,), shard_dim=None, optional=True)

    score = head("score", SCORE_HEAD, 1)
    return (score, head("group_head", GROUP_HEAD, num_groups)) if num_groups > 1 else (score,)
