"""The parts that the families' tables of tensors are put together from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

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
    from megatron_gil.models.families.spec import ModelSpec

Head = Literal["lm", "score", "critic"]


def model_weights(spec: ModelSpec, layer: tuple[Weight, ...], head: Head, num_groups: int) -> WeightTable:
    """num_groups: a critic with more than one has a group classifier beside its value head."""
    embedding = HfTensor(EMBEDDING, (spec.vocab_size, spec.hidden_size))
    names = ("embedding.word_embeddings.weight",)
    return WeightTable(
        first=(Weight(name="embedding", param_names=names, parts=(embedding,), shard_dim=0),),
        layer=layer,
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


def plain_layer(spec: ModelSpec) -> tuple[Weight, ...]:
    """Llama's: RMSNorm before attention and before SwiGLU, no bias anywhere."""
    hidden, ffn = spec.hidden_size, spec.ffn_size
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    return (
        Weight(
            name="attention_norm",
            param_names=_megatron("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
            parts=(_hf("input_layernorm.weight", hidden),),
            shard_dim=None,
        ),
        Weight(
            name="qkv",
            param_names=_megatron("self_attention.linear_qkv.weight"),
            parts=(
                _hf("self_attn.q_proj.weight", queries, hidden),
                _hf("self_attn.k_proj.weight", keys, hidden),
                _hf("self_attn.v_proj.weight", keys, hidden),
            ),
            shard_dim=0,
            num_blocks=spec.num_kv_heads,  # megatron keeps a key-value head behind the query heads that read it
        ),
        Weight(
            name="proj",
            param_names=_megatron("self_attention.linear_proj.weight"),
            parts=(_hf("self_attn.o_proj.weight", hidden, queries),),
            shard_dim=1,
        ),
        Weight(
            name="mlp_norm",
            param_names=_megatron("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
            parts=(_hf("post_attention_layernorm.weight", hidden),),
            shard_dim=None,
        ),
        Weight(
            name="gate_up",
            param_names=_megatron("mlp.linear_fc1.weight"),
            parts=(_hf("mlp.gate_proj.weight", ffn, hidden), _hf("mlp.up_proj.weight", ffn, hidden)),
            shard_dim=0,
        ),
        Weight(
            name="down",
            param_names=_megatron("mlp.linear_fc2.weight"),
            parts=(_hf("mlp.down_proj.weight", hidden, ffn),),
            shard_dim=1,
        ),
    )


def qkv_bias(spec: ModelSpec) -> Weight:
    """Of queries, keys and values."""
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    return Weight(
        name="qkv_bias",
        param_names=_megatron("self_attention.linear_qkv.bias"),
        parts=(
            _hf("self_attn.q_proj.bias", queries),
            _hf("self_attn.k_proj.bias", keys),
            _hf("self_attn.v_proj.bias", keys),
        ),
        shard_dim=0,
        num_blocks=spec.num_kv_heads,
    )


def query_key_norms(spec: ModelSpec) -> tuple[Weight, Weight]:
    """RMSNorm of every query head and of every key head, on all ranks alike."""

    def norm(name: str, hf_name: str, param_name: str) -> Weight:
        part = _hf(f"self_attn.{hf_name}.weight", spec.head_dim)
        names = _megatron(f"self_attention.{param_name}.weight")
        return Weight(name=name, param_names=names, parts=(part,), shard_dim=None)

    return norm("query_norm", "q_norm", "q_layernorm"), norm("key_norm", "k_norm", "k_layernorm")


def _hf(name: str, *shape: int) -> HfTensor:
    return HfTensor(f"model.layers.{{layer}}.{name}", shape)


def _megatron(*names: str) -> tuple[str, ...]:
    return tuple(f"decoder.layers.{{layer}}.{name}" for name in names)


def _lm_head(spec: ModelSpec, embedding: HfTensor) -> tuple[Weight]:
    part = embedding if spec.tied else HfTensor(LM_HEAD, embedding.shape)
    names = ("output_layer.weight",)
    return (Weight(name="head", param_names=names, parts=(part,), shard_dim=0, is_copy=spec.tied),)


def _scalar_heads(spec: ModelSpec, num_groups: int) -> tuple[Weight, ...]:
    """Of models/heads.py."""

    def head(name: str, hf_name: str, num_rows: int) -> Weight:
        names, part = (f"output_layer.{name}.weight",), HfTensor(hf_name, (num_rows, spec.hidden_size))
        return Weight(name=name, param_names=names, parts=(part,), shard_dim=None, optional=True)

    score = head("score", SCORE_HEAD, 1)
    return (score, head("group_head", GROUP_HEAD, num_groups)) if num_groups > 1 else (score,)
