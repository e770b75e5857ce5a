"""Small random models, written by transformers: the other side of every comparison in this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 61,  # not divisible by 2: the padding of the vocabulary is always at work
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.15,  # logits of some size, so that a tolerance of 1e-5 means something
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.5,  # none of the numbers is Llama 3.1's own: a built-in constant would show
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}

WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}

VARIANTS: dict[str, dict[str, Any]] = {
    "grouped_heads": {},
    "tied": {"tie_word_embeddings": True},
    "all_heads": {"num_key_value_heads": 4},
    "wide_heads": {"head_dim": 16},  # heads x head_dim is not the hidden size
    "llama3_rope": {"rope_parameters": LLAMA3_ROPE},
    "other_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    "qwen2": {"family": "Qwen2", "tie_word_embeddings": True},
    "qwen2_window": {"family": "Qwen2", **WINDOW},
    "qwen3": {"family": "Qwen3", "head_dim": 16},
    "mistral": {"family": "Mistral", "sliding_window": 6},
}
FAMILIES = ("qwen2", "qwen3", "mistral")
"""A variant of each, beside Llama."""


def make_model(
    path: Path, *, family: str = "Llama", head: str = "lm", max_shard_size: str = "5GB", **sizes: Any
) -> Any:
    """A model of transformers with random weights, its norms' and biases' too, saved under `path`."""
    torch.manual_seed(7)
    kind: Any = getattr(transformers, family + {"lm": "ForCausalLM", "score": "ForSequenceClassification"}[head])
    model = kind(kind.config_class(**{**SIZES, **sizes}, num_labels=1)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.5)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return model


def sample_tokens(num_rows: int = 3, width: int = 24) -> torch.Tensor:  # [B, T]
    """Without token 0: transformers gives the padding token's embedding no gradient, megatron makes no exception."""
    return torch.randint(1, SIZES["vocab_size"], (num_rows, width), generator=torch.Generator().manual_seed(3))
