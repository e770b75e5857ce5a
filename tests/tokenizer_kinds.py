"""A model directory's tokenizer in every form that it comes in, trained on the spot."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

CORPUS = """Human: Can you tell me how the old lighthouse keeper spent his days?
Assistant: He cleaned the lamps, wrote the log, and looked at the sea. Is there anything else you would like to know?
Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her friends.
TL;DR: I moved to a new town, lost my keys twice, and now my neighbours think that I am a locksmith.
The quick brown fox jumps over the lazy dog; 1234567890 times, they say, but nobody counted!
<html><s>old</s> <b>bold</b> [INST] is [/INST] | user | assistant | im_start | im_end | pad | unk | s>"""
PIECES = 420
TURNS = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] | trim }} {{ eos_token }}"
    "{% else %}{{ bos_token }}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
)


def write_kinds(root: Path) -> dict[str, Path]:
    """name -> directory."""
    return {name: _make(root / name, write) for name, write in KINDS.items()}


def _make(directory: Path, write: Callable[[Path], None]) -> Path:
    directory.mkdir()
    write(directory)
    return directory


def train_sentencepiece(directory: Path, **changes: Any) -> None:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    own = {
        "model_type": "bpe",
        "vocab_size": PIECES,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "minloglevel": 2,
        "num_threads": 1,
    }
    SentencePieceTrainer.train(sentence_iterator=iter(CORPUS.split("\n")), model_writer=model, **{**own, **changes})
    (directory / "tokenizer.model").write_bytes(model.getvalue())


def _collapsing(directory: Path) -> None:
    """sentencepiece's own defaults: NFKC, one space of several."""
    train_sentencepiece(directory, normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)


def _no_prefix(directory: Path) -> None:
    """As the miniature's: pieces that its user defined, and turns in Llama 2's form."""
    train_sentencepiece(
        directory, add_dummy_prefix=False, user_defined_symbols=["\n\nHuman:", "\n\nAssistant:", "[INST]"], pad_id=3
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    write_json(directory / "tokenizer_config.json", {**special, "add_bos_token": True, "chat_template": INST})


def _added(directory: Path) -> None:
    train_sentencepiece(directory)
    write_json(directory / "added_tokens.json", {token: PIECES + i for i, token in enumerate(TURNS)})
    (directory / "chat_template.jinja").write_text(CHATML)
    write_json(directory / "generation_config.json", {"eos_token_id": [2, PIECES + 1]})


def _metaspace(directory: Path) -> None:
    """The sentencepiece model as transformers 5 writes it."""
    from transformers import LlamaTokenizer

    train_sentencepiece(directory)
    LlamaTokenizer.from_pretrained(directory).save_pretrained(directory)
    (directory / "tokenizer.model").unlink(missing_ok=True)


def _prepend(directory: Path) -> None:
    """The same as transformers 4 wrote Llama 2's, with turns added that are not special."""
    _metaspace(directory)
    path = directory / "tokenizer.json"
    specification = json.loads(path.read_text())
    specification["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        ],
    }
    specification["pre_tokenizer"] = None
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    turns = [{"id": PIECES + i, "content": token, **plain} for i, token in enumerate(TURNS)]
    specification["added_tokens"] += turns
    path.write_text(json.dumps(specification))
    config = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    decoder = {str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in turns}
    config |= {"added_tokens_decoder": decoder, "chat_template": CHATML, "legacy": False}
    write_json(directory / "tokenizer_config.json", config)


def _byte_level(directory: Path) -> None:
    """As Llama 3 has it: byte-level, words looked up whole, a template that begins with bos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    fast = Tokenizer(models.BPE(ignore_merges=True))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|eot|>", "<|role|>", "<s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(CORPUS.split("\n"), trainer)
    fast.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    fast.save(str(directory / "tokenizer.json"))
    template = (
        "{{ bos_token }}{% for m in messages %}<|role|>{{ m['role'] }}\n{{ m['content'] | trim }}<|eot|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|role|>assistant\n{% endif %}"
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "chat_template": template}
    eos = {"__type": "AddedToken", "content": "<|eot|>", "special": True}
    write_json(directory / "tokenizer_config.json", {**config, "eos_token": eos})


QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_qwen_tokenizer(directory: Path) -> None:
    """As Qwen2.5 has it: byte-level in NFC, no bos, and padded with one of the tokens that end a text."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    fast = Tokenizer(models.BPE())
    fast.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=PIECES, initial_alphabet=alphabet, show_progress=False)
    fast.train_from_iterator(CORPUS.split("\n"), trainer)
    special = ("<|endoftext|>", *TURNS, "<|object_ref_start|>", "<|vision_pad|>")
    fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast.save(str(directory / "tokenizer.json"))
    ends = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}
    config = {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "chat_template": CHATML, **ends}
    write_json(directory / "tokenizer_config.json", config)
    write_json(directory / "generation_config.json", {"eos_token_id": [PIECES + 2, PIECES], "pad_token_id": PIECES})


def _fast_added(directory: Path) -> None:
    """tokenizer.json with tokens that only added_tokens.json has."""
    _metaspace(directory)
    write_json(directory / "added_tokens.json", {token: PIECES + i for i, token in enumerate(TURNS)})
    (directory / "chat_template.jinja").write_text(CHATML)


KINDS: dict[str, Callable[[Path], None]] = {
    "sentencepiece": train_sentencepiece,
    "collapsing": _collapsing,
    "no_prefix": _no_prefix,
    "unigram": lambda directory: train_sentencepiece(directory, model_type="unigram", vocab_size=330),
    "added": _added,
    "metaspace": _metaspace,
    "prepend": _prepend,
    "byte_level": _byte_level,
    "fast_added": _fast_added,
    "qwen": write_qwen_tokenizer,
}


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def copy_kind(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))
