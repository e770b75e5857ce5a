"""What a model is: the sizes of config.json, checked, and the layouts that can hold it. Does not import torch, so that
a directory is read and checked at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Self

from megatron_gil.config import ConfigError
from megatron_gil.models.families.config_reader import ConfigReader, Llama3Scaling, TokenIds
from megatron_gil.models.families.tensors import Head, model_weights, plain_layer

if TYPE_CHECKING:
    import torch

    from megatron_gil.models.weight_table import Weight, WeightTable


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The sizes of a model. A family is a subclass, and overrides what it has otherwise: see llama.py, which has
    nothing, and qwen2.py."""

    model_type: ClassVar[str]
    """config.json's name of the family."""
    name: ClassVar[str]
    """What transformers' classes of the family begin with."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """What transformers takes where config.json lacks a key, as far as families differ in it."""
    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    window: int | None = None
    """Of the positions up to its own a position sees the last so many; None: all."""
    tied: bool
    """The language-model head is the input embedding."""
    bos_token_id: TokenIds
    eos_token_id: TokenIds
    pad_token_id: TokenIds

    def layer_weights(self) -> tuple[Weight, ...]:
        """The tensors of a layer. What a layer computes follows from them: the names in LayerWeights of
        engine/decoder_weights.py."""
        return plain_layer(self)

    @classmethod
    def read_window(cls, reader: ConfigReader, num_layers: int) -> int | None:
        """`window`."""
        return None

    def own_config(self) -> dict[str, Any]:
        """The keys of config.json that the family has beside those of all."""
        return {}

    @classmethod
    def from_config(cls, raw: dict[str, Any], source: str) -> Self:
        reader = ConfigReader(raw, source, cls.defaults)
        reader.check_architecture(cls.name, sorted(set(cls.architectures().values())))
        num_heads = reader.size("num_attention_heads")
        hidden_size = reader.size("hidden_size")
        num_kv_heads = reader.size("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise ConfigError(
                f"{source}: num_attention_heads={num_heads} cannot be divided by num_key_value_heads={num_kv_heads}"
            )
        head_dim = reader.size("head_dim", hidden_size // num_heads)
        if head_dim % 2:
            raise ConfigError(f"{source}: head_dim is {head_dim}, expected an even number: RoPE turns pairs")
        theta, scaling = reader.rope()
        num_layers = reader.size("num_hidden_layers")
        return cls(
            hidden_size=hidden_size,
            ffn_size=reader.size("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            vocab_size=reader.size("vocab_size"),
            max_positions=reader.size("max_position_embeddings"),
            norm_eps=reader.number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            window=cls.read_window(reader, num_layers),
            tied=reader.flag("tie_word_embeddings"),
            bos_token_id=reader.token_ids("bos_token_id"),
            eos_token_id=reader.token_ids("eos_token_id"),
            pad_token_id=reader.token_ids("pad_token_id"),
        )

    @classmethod
    def architectures(cls) -> dict[Head, str]:
        """transformers' classes."""
        scores = f"{cls.name}ForSequenceClassification"
        return {"lm": f"{cls.name}ForCausalLM", "score": scores, "critic": scores}

    def layers_of(self, pp_rank: int, pp_size: int) -> range:
        """The layers of one pipeline rank; where they do not divide, the first ranks have one more than the last."""
        share, rest = divmod(self.num_layers, pp_size)
        first = pp_rank * share + min(pp_rank, rest)
        return range(first, first + share + (pp_rank < rest))

    def padded_vocab_size(self, tp_size: int) -> int:
        """Rows of the embedding so that every tensor-parallel rank holds as many; never seen outside the model."""
        return math.ceil(self.vocab_size / tp_size) * tp_size

    def weights(self, head: Head, num_groups: int = 0) -> WeightTable:
        """The model's tensors: names, shapes and how ranks share them; group logits with more than one group."""
        return _weights(self, head, num_groups)

    def hf_config(self, *, head: Head, num_groups: int = 0, dtype: torch.dtype) -> dict[str, Any]:
        """config.json for these sizes, in the keys that both transformers 4 and 5 read."""
        config: dict[str, Any] = {
            "architectures": [self.architectures()[head]],
            "model_type": self.model_type,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling_config(),
            "tie_word_embeddings": self.tied,
            "attention_dropout": 0.0,
            **self.own_config(),
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            "torch_dtype": str(dtype).removeprefix("torch."),
        }
        if head != "lm":
            config["num_labels"] = 1
            config["id2label"] = {"0": "LABEL_0"}
            config["label2id"] = {"LABEL_0": 0}
        if num_groups > 1:
            config["num_groups"] = num_groups
        return config

    def rope_scaling_config(self) -> dict[str, Any] | None:
        """RoPE's scaling, theta not included, as config.json spells it."""
        if self.rope_scaling is None:
            return None
        return {
            "rope_type": "llama3",
            "factor": self.rope_scaling.factor,
            "low_freq_factor": self.rope_scaling.low_freq_factor,
            "high_freq_factor": self.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": self.rope_scaling.original_max_positions,
        }


@cache  # a plan asks for it thousands of times
def _weights(spec: ModelSpec, head: Head, num_groups: int) -> WeightTable:
    return model_weights(spec, spec.layer_weights(), head, num_groups)


def check_layout(spec: ModelSpec, tp_size: int, pp_size: int, sequence_parallel: bool) -> None:
    """ConfigError where the model cannot be cut so; the vocabulary always can (it is padded)."""
    parts = (
        ("num_attention_heads", spec.num_heads),
        ("num_key_value_heads", spec.num_kv_heads),
        ("intermediate_size", spec.ffn_size),
    )
    for key, size in parts:
        if size % tp_size:
            fits = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
            raise ConfigError(
                f"the model's {key}={size} cannot be divided by parallel.tensor_size={tp_size}; set it to one of {fits}"
            )
    if pp_size > spec.num_layers:
        raise ConfigError(
            f"the model's num_hidden_layers={spec.num_layers} cannot be cut into parallel.pipeline_size={pp_size}; set "
            f"it to at most {spec.num_layers}"
        )
    if sequence_parallel and tp_size == 1:
        raise ConfigError("parallel.sequence_parallel=true needs parallel.tensor_size above 1; set one of the two")
    if (tp_size - 1) * (spec.padded_vocab_size(tp_size) // tp_size) >= spec.vocab_size:
        raise ConfigError(
            f"the model's vocab_size={spec.vocab_size} leaves a rank of parallel.tensor_size={tp_size} empty; lower it"
        )
