"""config.json and tokenizer files of a converted directory: what the source had, in every reader's spelling."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_gil.config import ConfigError
from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.models.families import Head, ModelSpec

CARD_FILE = "README.md"
_DROPPED = (
    "auto_map",  # names code of the source directory, which is not copied
    "num_groups",  # of the critic's group classifier, which is left out
    "num_labels",  # said by id2label
)
_DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def portable_config(raw: dict[str, Any], spec: ModelSpec, head: Head, dtype: str | None) -> dict[str, Any]:
    """The source's config.json with RoPE and dtype as transformers 4 and vLLM (rope_theta, rope_scaling, torch_dtype)
    and as transformers 5 (rope_parameters, dtype) read them.

    dtype: what all tensors are now stored in; None keeps what the source says.
    """
    config = {key: value for key, value in raw.items() if key not in _DROPPED}
    scaling = spec.rope_scaling_config()
    config |= {
        "architectures": [spec.architectures()[head]],
        "rope_theta": spec.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": spec.rope_theta},
        "head_dim": spec.head_dim,
        "num_key_value_heads": spec.num_kv_heads,
        "pad_token_id": spec.pad_token_id if _in_vocabulary(spec.pad_token_id, spec) else None,
    }
    name = _DTYPE_NAMES[dtype] if dtype else raw.get("dtype") or raw.get("torch_dtype")
    if name is not None:
        config |= {"dtype": name, "torch_dtype": name}
    if head != "lm":
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return config


def read_tokenizer(directory: Path) -> Tokenizer:
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ConfigError(f"{directory}: holds neither tokenizer.json nor tokenizer.model, expected beside config.json")
    return Tokenizer.read(directory)


def score_config(config: dict[str, Any], spec: ModelSpec, tokenizer: Tokenizer, source: Path) -> dict[str, Any]:
    """The config with a pad token that ends no text.

    transformers reads the score of a row at its last token that is not the pad token. So that is the model's own pad
    token unless that ends a sequence too, else the beginning-of-sequence token, else a control token that no row holds:
    Qwen's models pad with what ends their texts, and have no beginning of one.
    """
    unused = tokenizer.control_tokens - tokenizer.made_control_tokens.keys()
    spare = sorted(unused, key=lambda token: ("pad" not in token, tokenizer.id_of(token)))
    for token_id in (spec.pad_token_id, tokenizer.pad_id, tokenizer.bos_id, *map(tokenizer.id_of, spare)):
        if _in_vocabulary(token_id, spec) and token_id not in tokenizer.eos_ids:
            return {**config, "pad_token_id": token_id}
    raise ConfigError(f"{source}: no token to pad with but end-of-sequence; set pad_token_id in its config.json")


def write_small_files(config: dict[str, Any], head: Head, tokenizer: Tokenizer, source: Path, target: Path) -> None:
    """config.json, generation_config.json, the model card and the tokenizer, into `target`."""
    tokenizer.save(target)
    for name in ("generation_config.json", CARD_FILE):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if head != "lm":
        _set_pad_token(target, tokenizer.token(config["pad_token_id"]) or "")
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _in_vocabulary(token_id: Any, spec: ModelSpec) -> bool:
    return isinstance(token_id, int) and 0 <= token_id < spec.vocab_size


def _set_pad_token(directory: Path, token: str) -> None:
    """So that transformers' tokenizer pads with what the model skips."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = directory / name
        if path.exists() or name == "tokenizer_config.json":
            content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            path.write_text(json.dumps({**content, "pad_token": token}, indent=2) + "\n", encoding="utf-8")
