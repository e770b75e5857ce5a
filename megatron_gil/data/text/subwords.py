"""sentencepiece and tokenizers, the two libraries that turn text into token ids, behind one interface.

Text makes no control ids: a control token that is written in it is encoded as any other characters are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple, Protocol

from megatron_gil.config import ConfigError
from megatron_gil.data.text.special_tokens import SpecialTokens


class ControlToken(NamedTuple):
    id: int
    strips_left: bool = False  # the token takes away the spaces before it
    strips_right: bool = False


class Subwords(Protocol):
    vocab_size: int
    control: dict[str, ControlToken]

    def encode(self, text: str) -> list[int]:
        """Ids as the library gives them; no special ones are added."""
        ...

    def encode_continuation(self, text: str) -> list[int]:
        """The same for text that continues a row: no space is put before it."""
        ...

    def encode_after_control(self, text: str) -> list[int]:
        """The same for text that follows a control token."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text without control tokens."""
        ...

    def id_of(self, token: str) -> int | None: ...

    def token_of(self, token_id: int) -> str | None: ...


class SentencePieceModel:
    """`tokenizer.model`. Ids are sentencepiece's own; the dummy prefix stands at the start of the text only, not after
    a control token."""

    def __init__(self, source: str, proto: bytes, special: SpecialTokens) -> None:
        from google.protobuf.message import DecodeError
        from sentencepiece import SentencePieceNormalizer, SentencePieceProcessor
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]

        try:
            parsed = ModelProto.FromString(proto)
            SentencePieceProcessor().LoadFromSerializedProto(proto)  # the constructor takes empty bytes for no model
        except (RuntimeError, DecodeError):
            raise ConfigError(
                f"{source}: not a sentencepiece model; for Llama 3, whose original tokenizer.model is in another "
                "format, take the directory in Hugging Face format with tokenizer.json"
            ) from None
        pieces = control_pieces(parsed, special)
        self._model = SentencePieceProcessor(model_proto=parsed.SerializeToString())
        self._collapses_spaces = parsed.normalizer_spec.add_dummy_prefix and (
            parsed.normalizer_spec.remove_extra_whitespaces
        )
        parsed.normalizer_spec.add_dummy_prefix = False
        self._model_without_prefix = SentencePieceProcessor(model_proto=parsed.SerializeToString())
        parsed.normalizer_spec.remove_extra_whitespaces = False
        self._normalizer = SentencePieceNormalizer(model_proto=parsed.SerializeToString())
        added = {token: i for token, i in special.added_tokens.items() if i >= len(parsed.pieces)}
        control = added_control(special, len(parsed.pieces))
        self.control = {token: ControlToken(i) for token, i in pieces.items()}
        self.control |= {token: ControlToken(added[token]) for token in control}
        self._text_tokens = {token: i for token, i in added.items() if token not in control}
        self._text_token = _any_of(self._text_tokens)
        self._added_token_of = {i: token for token, i in added.items()}
        self._control_ids = {token.id for token in self.control.values()}
        self.vocab_size = max([len(parsed.pieces), *(i + 1 for i in added.values())])

    def encode(self, text: str) -> list[int]:
        first, *rest = self._text_token.split(text)
        return self._model.encode(first) + self._encode_parts(rest)

    def encode_continuation(self, text: str) -> list[int]:
        return self._encode_parts(self._text_token.split(text))

    encode_after_control = encode_continuation

    def _encode_parts(self, parts: Sequence[str]) -> list[int]:
        own = self._text_tokens
        return [i for part in parts for i in ([own[part]] if part in own else self._rest(part))]

    def _rest(self, text: str) -> list[int]:
        # A model that strips spaces at the start would lose the space that separates this text from what precedes it.
        # The dummy prefix of the whole model is exactly one space and takes its place. (A line end may count as a space
        # too.)
        if self._collapses_spaces and self._normalizer.normalize(text).startswith("\u2581"):
            return self._model.encode(text)
        return self._model_without_prefix.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        # a model's vocabulary may be padded, and the library raises an error for an id without a piece
        ids = [i for i in ids if i not in self._control_ids and self.token_of(i) is not None]
        text, model = "", self._model
        for is_added, run in groupby(ids, key=self._added_token_of.__contains__):
            found = list(run)
            text += "".join(self._added_token_of[i] for i in found) if is_added else model.decode(found)
            model = self._model_without_prefix
        return text

    def id_of(self, token: str) -> int | None:
        if token in self.control:
            return self.control[token].id
        if token in self._text_tokens:
            return self._text_tokens[token]
        token_id = self._model.piece_to_id(token)
        return None if token_id == self._model.unk_id() else token_id

    def token_of(self, token_id: int) -> str | None:
        added = self._added_token_of.get(token_id)
        if added is None and token_id >= self._model.vocab_size():
            return None
        return self._model.id_to_piece(token_id) if added is None else added

    @property
    def bos_id(self) -> int | None:
        return None if self._model.bos_id() < 0 else self._model.bos_id()

    @property
    def eos_id(self) -> int | None:
        return None if self._model.eos_id() < 0 else self._model.eos_id()


def control_pieces(model: Any, special: SpecialTokens) -> dict[str, int]:
    """Control token -> id, of the pieces of a sentencepiece model. A control token that the model itself counts as
    text (user defined; or normal, where a file gives it a role) is made a control piece in place."""
    found = {}
    own_text = {piece.piece for piece in model.pieces if piece.type == piece.USER_DEFINED}
    for i, piece in enumerate(model.pieces):
        own = piece.type in (piece.CONTROL, piece.UNKNOWN)
        text = piece.type == piece.USER_DEFINED or (piece.type == piece.NORMAL and piece.piece in special.named)
        if own or (text and special.is_control(piece.piece, is_special=False, beside=own_text)):
            found[piece.piece] = i
            if not own:
                piece.type = piece.CONTROL
    return found


def added_control(special: SpecialTokens, first_id: int) -> set[str]:
    """Those of the tokens added to a sentencepiece model that are control tokens. A token that no file describes is
    one."""
    return {
        token
        for token, i in special.added_tokens.items()
        if i >= first_id
        and special.is_control(
            token, is_special=special.added_are_special.get(token, True), beside=special.added_tokens
        )
    }


class FastModel:
    """`tokenizer.json`, read by the tokenizers library; its own truncation and padding are switched off.

    json: the file's content, with the tokens that only other files name.
    """

    def __init__(self, source: str, text: bytes, special: SpecialTokens) -> None:
        try:
            specification = json.loads(text)
            num_own = len(specification.get("added_tokens") or [])
            entries = _added_tokens(specification, special)
            self.json = text if len(entries) == num_own else json.dumps(specification, ensure_ascii=False).encode()
            self._model = _read_fast(specification)
        except Exception as error:  # the tokenizers library raises plain Exception
            raise ConfigError(f"{source}: not a tokenizer of the tokenizers library: {error}") from None
        self.control = {
            entry["content"]: ControlToken(
                self._model.token_to_id(entry["content"]), bool(entry.get("lstrip")), bool(entry.get("rstrip"))
            )
            for entry in entries
            if entry["special"]
        }
        self._model_after_control = _read_fast(specification) if _keep_prefix_at_start(specification) else self._model
        changed = _drop_prefix(specification)
        self._model_without_prefix = _read_fast(specification) if changed else self._model_after_control
        unknown = specification["model"].get("unk_token")  # the token for characters outside of the vocabulary
        self._no_text_ids = {token.id for name, token in self.control.items() if name != unknown}
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        return self._encode(text, self._model)

    def encode_continuation(self, text: str) -> list[int]:
        return self._encode(text, self._model_without_prefix)

    def encode_after_control(self, text: str) -> list[int]:
        return self._encode(text, self._model_after_control)

    def _encode(self, text: str, model: Any) -> list[int]:
        ids = model.encode(text, add_special_tokens=False).ids
        if self._no_text_ids.isdisjoint(ids):
            return ids
        # A model that looks up whole words finds a control token that is written in the text. Then each character is
        # encoded by itself: one character is no control token.
        parts = [model, *[self._model_without_prefix] * (len(text) - 1)]
        single = [part.encode(c, add_special_tokens=False).ids for part, c in zip(parts, text, strict=True)]
        return [i for found in single for i in found]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(ids), skip_special_tokens=True)

    def id_of(self, token: str) -> int | None:
        return self._model.token_to_id(token)

    def token_of(self, token_id: int) -> str | None:
        return self._model.id_to_token(token_id)

    def adds_first(self, token_id: int) -> bool:
        """Whether the library itself begins a text with this token."""
        return self._model.encode("a", add_special_tokens=True).ids[:1] == [token_id]


def _read_fast(specification: Any) -> Any:
    from tokenizers import Tokenizer

    model = Tokenizer.from_str(json.dumps(specification))
    model.no_truncation()
    model.no_padding()
    model.encode_special_tokens = True  # as text
    return model


def _added_tokens(specification: dict[str, Any], special: SpecialTokens) -> list[dict[str, Any]]:
    """The added tokens of a tokenizer.json, changed in place: those that only other files name are added, as in
    transformers, and every control token is marked special."""
    vocabulary = specification["model"].get("vocab") or {}
    ids = vocabulary if isinstance(vocabulary, dict) else {piece[0]: i for i, piece in enumerate(vocabulary)}
    entries = specification["added_tokens"] = list(specification.get("added_tokens") or [])
    known = {entry["content"] for entry in entries}
    missing = {token: ids[token] for token in special.named if token in ids}
    missing |= special.added_tokens
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for token, i in sorted(missing.items(), key=lambda item: item[1]):
        if token not in known:
            is_special = special.added_are_special.get(token, True)
            entries.append({"id": i, "content": token, **plain, "special": is_special})
    beside = {entry["content"] for entry in entries}
    for entry in entries:
        is_special = bool(entry.get("special"))
        entry["special"] = special.is_control(entry["content"], is_special=is_special, beside=beside)
    return entries


def _keep_prefix_at_start(specification: dict[str, Any]) -> bool:
    """Switch off, in place, what puts a space before the first text but not before others; returns whether there was
    such a part."""
    parts = [p for p in _parts(specification, "pre_tokenizer", "pretokenizers") if p.get("prepend_scheme") == "first"]
    for part in parts:
        part["prepend_scheme"] = "never"
        part["add_prefix_space"] = False
    return bool(parts)


def _drop_prefix(specification: dict[str, Any]) -> bool:
    """Switch off, in place, every part of a tokenizer.json that puts a space before a text; returns whether there
    was one."""
    normalizers = _parts(specification, "normalizer", "normalizers")
    prefixes = [part for part in normalizers if part["type"] == "Prepend" and part["prepend"]]
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


def _any_of(tokens: Mapping[str, int]) -> re.Pattern[str]:
    """Splits a text at these tokens and keeps them; matches nothing where there are no tokens."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")
