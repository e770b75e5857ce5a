from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_gil.data.text.tokenizer import Tokenizer

_CORPUS = """Human: Can you tell me how the old lighthouse keeper spent his days?
Assistant: He cleaned the lamps, wrote the log, and looked at the sea. Is there anything else you would like to know?
Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her friends.
TL;DR: I moved to a new town, lost my keys twice, and now my neighbours think that I am a locksmith.
The quick brown fox jumps over the lazy dog; 1234567890 times, they say, but nobody counted!"""


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The directory of public data files; tests that read it are skipped where it is absent."""
    default = Path(__file__).parents[2] / ".." / "shared" / "data"
    directory = Path(os.environ.get("MEGATRON_GIL_DATA", default)).resolve()
    if not directory.is_dir():
        pytest.skip(f"no public data at {directory}; set MEGATRON_GIL_DATA")
    return directory


@pytest.fixture(autouse=True, scope="session")
def cache_of_this_run(tmp_path_factory: pytest.TempPathFactory) -> Iterable[None]:

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="session")
def sentencepiece_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.model with Llama's settings: BPE, byte fallback, dummy prefix, no normalisation."""
    from sentencepiece import SentencePieceTrainer

    directory = tmp_path_factory.mktemp("sentencepiece")
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(_CORPUS.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    return directory


@pytest.fixture(scope="session")
def byte_level_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json as Llama 3 has it: byte-level BPE, special tokens, a template that begins with bos."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|eot|>", "<|role|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(_CORPUS.splitlines(), trainer)
    fast.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    fast.enable_truncation(8)  # as files in the wild carry; it must not cut what we encode
    fast.enable_padding(length=8)
    directory = tmp_path_factory.mktemp("byte_level")
    fast.save(str(directory / "tokenizer.json"))
    template = (
        "{{ bos_token }}{% for m in messages %}<|role|>{{ m['role'] }}\n{{ m['content'] | trim }}<|eot|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|role|>assistant\n{% endif %}"
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "chat_template": template}
    config |= {"eos_token": {"__type": "AddedToken", "content": "<|eot|>", "special": True}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    return directory


@pytest.fixture(scope="session")
def plain_tokenizer(sentencepiece_dir: Path) -> Tokenizer:
    return Tokenizer.read(sentencepiece_dir)


@pytest.fixture(scope="session")
def chat_tokenizer(byte_level_dir: Path) -> Tokenizer:
    return Tokenizer.read(byte_level_dir)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: Sequence[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
        return path

    return write
