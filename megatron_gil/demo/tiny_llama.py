"""A tiny Llama with random weights and a tokenizer trained on the spot, as a Hugging Face directory."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from megatron_gil.models.families import spec_from_config

BOS_ID, EOS_ID, UNK_ID, PAD_ID = 1, 2, 0, 3
INIT_STD = 0.08
"""About 1 / sqrt(hidden size): from the usual 0.02 so small a model takes twice the updates to learn to copy."""
LAST_OF_BRANCH = ("proj", "down")
"""The matrices that write into the residual stream, by the table's names (models/families/tensors.py)."""


def train_tokenizer(texts: Iterable[str], path: Path, *, vocab_size: int) -> None:
    """Writes a sentencepiece model (byte-pair encoding) with exactly `vocab_size` pieces, silently."""
    import sentencepiece

    with path.open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,
            normalization_rule_name="identity",  # transformers leaves the normaliser of a tokenizer.model out
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,  # every word follows a space already
            user_defined_symbols=["\n\nHuman:", "\n\nAssistant:"],
            num_threads=1,  # the pieces must not depend on how many cores there are
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=PAD_ID,
            minloglevel=2,
        )


def llama_config(*, vocab_size: int, hidden_size: int, ffn_size: int, num_layers: int) -> dict[str, object]:
    """config.json of a Llama with 4 heads and 2 key-value heads, read alike by transformers 4 and 5."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": ffn_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden_size // 4,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": INIT_STD,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "torch_dtype": "float32",
    }


def llama_weights(config: dict[str, object], *, seed: int) -> dict[str, Tensor]:
    """Random float32 weights under transformers' names; matrices are normal with std 0.08, the residual
    branches' last ones with 0.08 / sqrt(2 * layers) (GPT-2's rule)."""
    spec = spec_from_config(config, source="the tiny Llama's config.json")
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for weight, tensor in spec.weights("lm").hf_tensors(spec.num_layers):
        if len(tensor.shape) == 1:
            weights[tensor.name] = torch.ones(tensor.shape)
            continue
        std = INIT_STD / (2 * spec.num_layers) ** 0.5 if weight.name in LAST_OF_BRANCH else INIT_STD
        weights[tensor.name] = torch.randn(tensor.shape, generator=generator) * std
    return weights


def write_tiny_llama(
    directory: Path,
    texts: Iterable[str],
    *,
    seed: int,
    vocab_size: int = 384,
) -> None:
    """config.json, model.safetensors and a tokenizer trained on `texts`, in a directory that exists."""
    from safetensors.torch import save_file

    train_tokenizer(texts, directory / "tokenizer.model", vocab_size=vocab_size)
    config = llama_config(vocab_size=vocab_size, hidden_size=64, ffn_size=192, num_layers=2)
    save_file(llama_weights(config, seed=seed), directory / "model.safetensors", metadata={"format": "pt"})
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    tokenizer = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        **special,
    }
    generation = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", tokenizer),
        ("special_tokens_map.json", special),
    ):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
