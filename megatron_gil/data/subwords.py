"""The two libraries that turn text into token ids, behind one interface."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from megatron_gil.config import ConfigError


class Subwords(Protocol):
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Ids as the library gives them, special tokens written in the text recognised, none added."""
        ...

    def encode_continuation(self, text: str) -> list[int]:
        """The same for text that continues a row: no space is put before it."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        ...

    def id_of(self, token: str) -> int | None: ...

    def token_of(self, token_id: int) -> str: ...


class SentencePieceModel:
    """`tokenizer.model`. Ids are sentencepiece's own; as in transformers' LlamaTokenizer, special tokens written in
    the text are recognised, and the dummy prefix stands at the start of the text only, not after a special token."""

    def __init__(self, source: str, proto: bytes, added_tokens: Mapping[str, int]) -> None:
        from google.protobuf.message import DecodeError
        from sentencepiece import SentencePieceProcessor
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]

        try:
            parsed = ModelProto.FromString(proto)
            self._model = SentencePieceProcessor()
            self._model.LoadFromSerializedProto(proto)  # the constructor would take no bytes for no model
        except (RuntimeError, DecodeError):
            raise ConfigError(
                f"{source}: not a sentencepiece model; for Llama 3, whose original tokenizer.model is in another "
                "format, take the directory in Hugging Face format with tokenizer.json"
            ) from None
        self._collapses_spaces = parsed.normalizer_spec.add_dummy_prefix and (
            parsed.normalizer_spec.remove_extra_whitespaces
        )
        parsed.normalizer_spec.add_dummy_prefix = False
        self._model_without_prefix = SentencePieceProcessor(model_proto=parsed.SerializeToString())
        pieces = range(self._model.vocab_size())
        self._special = {
            self._model.id_to_piece(i): i for i in pieces if self._model.is_control(i) or self._model.is_unknown(i)
        } | {token: i for token, i in added_tokens.items() if i >= len(pieces)}
        self._token_of = {i: token for token, i in self._special.items()}
        self._special_pattern = _any_of(self._special)
        self.vocab_size = max([len(pieces), *(i + 1 for i in self._token_of)])

    def encode(self, text: str) -> list[int]:
        first, *rest = self._special_pattern.split(text)
        return self._model.encode(first) + self._encode_parts(rest)

    def encode_continuation(self, text: str) -> list[int]:
        return self._encode_parts(self._special_pattern.split(text))

    def _encode_parts(self, parts: Sequence[str]) -> list[int]:
        return [i for part in parts for i in ([self._special[part]] if part in self._special else self._rest(part))]

    def _rest(self, text: str) -> list[int]:
        # A model that strips spaces at the start would lose the one that separates this text from what precedes it;
        # the dummy prefix of the full model is exactly that one space.
        if self._collapses_spaces and text.startswith(" "):
            return self._model.encode(text)
        return self._model_without_prefix.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([i for i in ids if i not in self._token_of])

    def id_of(self, token: str) -> int | None:
        if token in self._special:
            return self._special[token]
        token_id = self._model.piece_to_id(token)
        return None if token_id == self._model.unk_id() else token_id

    def token_of(self, token_id: int) -> str:
        return self._token_of[token_id] if token_id in self._token_of else self._model.id_to_piece(token_id)

    @property
    def bos_id(self) -> int | None:
        return None if self._model.bos_id() < 0 else self._model.bos_id()

    @property
    def eos_id(self) -> int | None:
        return None if self._model.eos_id() < 0 else self._model.eos_id()


class FastModel:
    """`tokenizer.json`, read by the tokenizers library; its own truncation and padding are switched off."""

    def __init__(self, source: str, text: bytes, special_tokens: Collection[str]) -> None:
        try:
            specification = json.loads(text)
            self._model = _read_fast(specification)
        except Exception as error:  # the tokenizers library raises plain Exception
            raise ConfigError(f"{source}: not a tokenizer of the tokenizers library: {error}") from None
        changed = _drop_dummy_prefix(specification)
        self._model_without_prefix = _read_fast(specification) if changed else self._model
        # transformers makes the tokens that tokenizer_config.json names special, whatever tokenizer.json says
        for model in (self._model, self._model_without_prefix):
            model.add_special_tokens([token for token in special_tokens if model.token_to_id(token) is not None])
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_continuation(self, text: str) -> list[int]:
        return self._model_without_prefix.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(ids), skip_special_tokens=True)

    def id_of(self, token: str) -> int | None:
        return self._model.token_to_id(token)

    def token_of(self, token_id: int) -> str:
        return self._model.id_to_token(token_id)

    def adds_first(self, token_id: int) -> bool:
        """Whether the library itself begins a text with this token."""
        return self._model.encode("a", add_special_tokens=True).ids[:1] == [token_id]


def _read_fast(specification: Any) -> Any:
    from tokenizers import Tokenizer

    model = Tokenizer.from_str(json.dumps(specification))
    model.no_truncation()
    model.no_padding()
    return model


def _drop_dummy_prefix(specification: dict[str, Any]) -> bool:
    """Switch off, in place, every part of a tokenizer.json that puts a space before a text; whether there was one."""
    normalizers = _parts(specification, "normalizer", "normalizers")
    prefixes = [part for part in normalizers if part["type"] == "Prepend"]
    for part in prefixes:
        part["prepend"] = ""
    spaced = [
        part
        for part in _parts(specification, "pre_tokenizer", "pretokenizers")
        if part.get("add_prefix_space") or part.get("prepend_scheme", "never") != "never"
    ]
    for part in spaced:
        part["add_prefix_space"] = False
        if part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
    return bool(prefixes or spaced)


def _parts(specification: dict[str, Any], key: str, list_key: str) -> list[dict[str, Any]]:
    part = specification.get(key)
    if part is None:
        return []
    return part[list_key] if part["type"] == "Sequence" else [part]


def _any_of(tokens: Collection[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
