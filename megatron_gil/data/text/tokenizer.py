"""One tokenizer interface over sentencepiece and Hugging Face fast tokenizers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from megatron_gil.config import ConfigError
from megatron_gil.data.text.chat import ChatTemplate, ChatText, Message, format_dialogue
from megatron_gil.data.text.sentencepiece_json import as_tokenizer_json
from megatron_gil.data.text.special_tokens import JSON_FILES, read_special_tokens
from megatron_gil.data.text.subwords import FastModel, SentencePieceModel, Subwords

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model")
_TAKEN_AS_IT_IS = ("PreTrainedTokenizerFast", "TokenizersBackend")
_OWN_FILES = (*_VOCABULARY_FILES, *JSON_FILES[:3], "chat_template.jinja")


class Tokenizer:
    """Text to token ids and back.

    A response is encoded as what follows its prompt: `encode(prompt, bos=True) + encode_continuation(response)`. No
    space is put between the two, and where the response begins with one (" Sure"), its first token is the same as in
    an encoding of prompt + response at once. (The two encodings differ only where the library would merge the prompt's
    last characters with the response's first. When a model generates, the prompt's tokens are fixed already, so they
    are fixed here too.)

    Text makes no control tokens, whatever is written in it: they come from the chat template alone (ChatText).
    """

    def __init__(self, directory: str, files: Mapping[str, bytes]) -> None:
        self._files = dict(files)
        self._special = read_special_tokens(directory, files)
        self._subwords: Subwords
        if "tokenizer.json" in files:
            self._subwords = FastModel(f"{directory}/tokenizer.json", files["tokenizer.json"], self._special)
        else:
            self._subwords = SentencePieceModel(f"{directory}/tokenizer.model", files["tokenizer.model"], self._special)
        self.vocab_size = self._subwords.vocab_size
        self.bos_id = self._first_id("bos")
        self.eos_ids = self._read_eos_ids(directory)
        self.eos_id = self.eos_ids[0]
        # Any id of the vocabulary will do for padding: rows have their lengths, and nothing is read beyond them. So a
        # model without a padding token (or with one outside its embedding) pads with eos, and its embedding is never
        # resized.
        self.pad_id = self._read_pad_id()
        self._add_bos = self._read_add_bos()
        template, strings = self._special.chat_template, self._special_strings()
        self._template = None if template is None else ChatTemplate(template, strings, self._subwords.control)

    @classmethod
    def read(cls, directory: str | Path) -> Tokenizer:
        """From a directory with tokenizer.json (taken where both are there, as in transformers) or tokenizer.model."""
        directory = Path(directory)
        if not cls.is_in(directory):
            raise ConfigError(f"{directory}: holds neither tokenizer.json nor tokenizer.model; set data.tokenizer")
        return cls(str(directory), _read_files(directory, (*_OWN_FILES, *JSON_FILES[3:])))

    def is_copied_in(self, directory: Path) -> bool:
        """Whether the directory holds the same files: then the two tokenizers are equal, and neither need be read."""
        names = (*_OWN_FILES, *JSON_FILES[3:4])
        same = _read_files(directory, names) == {name: self._files[name] for name in names if name in self._files}
        return same and read_special_tokens(str(directory), _read_files(directory, JSON_FILES)).ids == self._special.ids

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @staticmethod
    def is_in(directory: Path) -> bool:
        return any((directory / name).is_file() for name in _VOCABULARY_FILES)

    @property
    def chat_template(self) -> str | None:
        return self._special.chat_template

    @property
    def adds_bos(self) -> bool:
        """Whether the beginning-of-sequence token stands before every text."""
        return self._add_bos

    @cached_property
    def control_tokens(self) -> frozenset[str]:
        """The tokens that text never makes."""
        return frozenset(self._subwords.control)

    @cached_property
    def made_control_tokens(self) -> dict[str, int]:
        """Control token -> id of those that rows can hold: bos, eos, and those that the chat template names."""
        ends, template = (self.bos_id, *self.eos_ids), self.chat_template or ""
        return {token: c.id for token, c in self._subwords.control.items() if c.id in ends or token in template}

    @cached_property
    def num_ids(self) -> int:
        """1 + the largest id that rows can hold. A token that was added for padding alone is not counted."""
        made = self.made_control_tokens
        for i in reversed(range(self.vocab_size)):
            token = self._subwords.token_of(i)
            if token is not None and (token in made or token not in self.control_tokens):
                return i + 1
        return 0

    def encode(self, text: str | ChatText, *, bos: bool = False) -> list[int]:
        """Ids of a text. With `bos` the beginning-of-sequence token stands first, if the model's tokenizer puts it
        there; a text that begins with it already, as a chat template may write it, gets no second one.
        """
        ids = self._encode(text, self._subwords.encode)
        if bos and self._add_bos and ids[:1] != [self.bos_id]:
            assert self.bos_id is not None
            return [self.bos_id, *ids]
        return ids

    def encode_continuation(self, text: str | ChatText) -> list[int]:
        """Ids of text that follows other text in a row: no beginning-of-sequence token, no space put before it."""
        return self._encode(text, self._subwords.encode_continuation)

    def _encode(self, text: str | ChatText, encode_first: Callable[[str], list[int]]) -> list[int]:
        if isinstance(text, str):
            return encode_first(text)
        ids: list[int] = []
        parts, control = list(text.parts()), self._subwords.control
        for i, (part, is_control) in enumerate(parts):
            if is_control:
                ids.append(control[part].id)
                continue
            if i and control[parts[i - 1][0]].strips_right:
                part = part.lstrip()
            if i + 1 < len(parts) and control[parts[i + 1][0]].strips_left:
                part = part.rstrip()
            ids += (self._subwords.encode_after_control if i else encode_first)(part)
        return ids

    def decode(self, ids: Sequence[int], *, after: Sequence[int] = ()) -> str:
        """The text of the ids, without control tokens. With `after`, the text that these ids add to that of the ids
        before: the space between the two is kept, which decoding the ids alone would drop.
        """
        if not len(after):
            return self._subwords.decode(ids)
        before, whole = self._subwords.decode(after), self._subwords.decode([*after, *ids])
        # where `after` ends inside of a character, its text is no prefix of the whole text
        return whole[len(before) :] if whole.startswith(before) else self._subwords.decode(ids)

    def token(self, token_id: int) -> str | None:
        """How the vocabulary writes one id, special or not; None for an id without a token."""
        return self._subwords.token_of(token_id)

    def id_of(self, token: str) -> int | None:
        return self._subwords.id_of(token)

    def format_prompt(self, messages: Sequence[Message]) -> ChatText:
        """A conversation up to where the assistant's response begins: in the model's chat template where it has one, in
        the Human/Assistant form of HH-RLHF otherwise."""
        if self._template is None:
            return ChatText(format_dialogue(messages))
        return self._template.render(messages, open_response=True)

    def format_closed(self, messages: Sequence[Message]) -> ChatText:
        """A conversation that ends in an assistant's turn, as the chat template writes it."""
        assert self._template is not None
        return self._template.render(messages, open_response=False)

    def files(self) -> dict[str, bytes]:
        """name -> content of what a model directory needs so that transformers reads as we do: the directory's own
        files; for a tokenizer.model the same model as tokenizer.json; and a tokenizer_config.json by which transformers
        takes tokenizer.json as it is, where for a Llama it would build another from its parts."""
        files = {name: self._files[name] for name in _OWN_FILES if name in self._files}
        if isinstance(self._subwords, FastModel):
            files["tokenizer.json"] = self._subwords.json
        config, strings = json.loads(files.get("tokenizer_config.json", b"{}")), self._special_strings()
        if "tokenizer.json" in files and config.get("tokenizer_class") in _TAKEN_AS_IT_IS:
            return files
        if "tokenizer.json" not in files:
            bos = strings["bos_token"] if self._add_bos else None
            text = as_tokenizer_json(files["tokenizer.model"], self._special, bos=bos)
            files |= {} if text is None else {"tokenizer.json": text.encode()}
        name = _TAKEN_AS_IT_IS[0] if "tokenizer.json" in files else "LlamaTokenizer"
        config = {**config, **strings, "tokenizer_class": name, "add_bos_token": self._add_bos, "add_eos_token": False}
        return {**files, "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode()}

    def save(self, directory: str | Path) -> None:
        """Write `files`."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (directory / name).write_bytes(content)

    def _first_id(self, name: str) -> int | None:
        """The token the tokenizer's files name, else the id the model's configs name, else sentencepiece's own."""
        token = self._special.tokens.get(f"{name}_token")
        named = None if token is None else self._subwords.id_of(token)
        if named is not None:
            return named
        if self._special.ids[name]:
            return self._special.ids[name][0]
        return getattr(self._subwords, f"{name}_id", None)

    def _read_eos_ids(self, directory: str) -> tuple[int, ...]:
        primary = self._first_id("eos")
        if primary is None:
            raise ConfigError(f"{directory}: no end-of-sequence token; name eos_token in tokenizer_config.json")
        return tuple(dict.fromkeys([primary, *self._special.ids["eos"]]))

    def _read_pad_id(self) -> int:
        pad_id = self._first_id("pad")
        limit = self._special.embedding_size or self.vocab_size
        return pad_id if pad_id is not None and pad_id < limit else self.eos_id

    def _read_add_bos(self) -> bool:
        if self.bos_id is None:
            return False
        if self._special.add_bos is not None:
            return self._special.add_bos
        return not isinstance(self._subwords, FastModel) or self._subwords.adds_first(self.bos_id)

    def _special_strings(self) -> dict[str, str]:
        known = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        named = {name: self._subwords.token_of(i) or "" for name, i in known.items() if i is not None}
        return {**named, **self._special.tokens}


def _read_files(directory: Path, names: Sequence[str]) -> dict[str, bytes]:
    """name -> content, of the files that are there."""
    return {name: (directory / name).read_bytes() for name in names if (directory / name).is_file()}
