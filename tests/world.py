"""Everything a training command reads, tiny: random Llamas with a tokenizer, prompts, demonstrations and pairs."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from megatron_gil.demo.tiny_llama import BOS_ID, EOS_ID, PAD_ID, train_tokenizer
from tests.models.tiny import FAMILIES, SIZES, VARIANTS, make_model

WORDS = ("sun", "moon", "sea", "tree", "bird", "stone", "rain", "snow", "wind", "fire")
NUM_ROWS = 24
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
IDS = {
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
    "num_hidden_layers": 2,
    "initializer_range": 0.08,
}


def write_world(root: Path) -> Path:
    """root/{policy, tied, other, reward_model}, root/{F, F_reward} of each other family F, and {prompts,
    demonstrations, preferences}.jsonl beside them."""
    rng = random.Random(5)
    texts = [_words(rng, rng.randint(1, 9)) for _ in range(6 * NUM_ROWS)]
    make_model(root / "policy", **IDS)
    make_model(root / "tied", **IDS, tie_word_embeddings=True)
    make_model(root / "other", **IDS, rms_norm_eps=1e-4)
    _shift_weights(root / "other", AutoModelForCausalLM)
    make_model(root / "reward_model", head="score", **IDS)
    _shift_weights(root / "reward_model", AutoModelForSequenceClassification)
    for name in FAMILIES:
        make_model(root / name, **VARIANTS[name], **IDS)
        make_model(root / f"{name}_reward", head="score", **VARIANTS[name], **IDS)
        _shift_weights(root / f"{name}_reward", AutoModelForSequenceClassification)
    train_tokenizer(texts, root / "tokenizer.model", vocab_size=SIZES["vocab_size"])
    for config in root.glob("*/config.json"):
        shutil.copyfile(root / "tokenizer.model", config.with_name("tokenizer.model"))
        write_json(config.with_name("tokenizer_config.json"), {"tokenizer_class": "LlamaTokenizer", **SPECIAL})
    prompts, responses, worse = (texts[i::3][:NUM_ROWS] for i in range(3))
    groups = ["even" if i % 2 else "odd" for i in range(NUM_ROWS)]
    write_rows(root / "prompts.jsonl", [{"prompt": p, "group": g} for p, g in zip(prompts, groups, strict=True)])
    pairs = list(zip(prompts, responses, worse, strict=True))
    write_rows(root / "demonstrations.jsonl", [{"prompt": p, "completion": " " + r} for p, r, _ in pairs])
    write_rows(
        root / "preferences.jsonl", [{"prompt": p, "chosen": " " + r, "rejected": " no " + w} for p, r, w in pairs]
    )
    return root


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def _words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(count))


def _shift_weights(path: Path, kind: Any) -> None:
    """Another model than the policy, which has the same seed."""
    model = kind.from_pretrained(path)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(path)
