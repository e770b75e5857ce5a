"""One tokenizer interface over sentencepiece and Hugging Face fast tokenizers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_gil.config import ConfigError
from megatron_gil.data.chat import Message, format_dialogue, render_template
from megatron_gil.data.sentencepiece_json import as_tokenizer_json
from megatron_gil.data.special_tokens import JSON_FILES, read_special_tokens
from megatron_gil.data.subwords import FastModel, SentencePieceModel

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model")
_OWN_FILES = (*_VOCABULARY_FILES, *JSON_FILES[:3], "chat_template.jinja")


class Tokenizer:
    """Text to token ids and back.

    A reply is encoded as what follows its prompt: `encode(prompt, bos=True) + encode_continuation(reply)`. No space
    is put between the two, and where the reply brings one (" Sure") its first token is the one that a single encoding
    of prompt + reply has there. (The two differ only where the library would merge the last characters of the prompt
    with the first of the reply; at generation time the prompt's tokens are already settled, so here they are too.)
    """

    def __init__(self, directory: str, files: Mapping[str, bytes]) -> None:
        self._files = dict(files)
        self._special = read_special_tokens(directory, files)
        if "tokenizer.json" in files:
            named = [*self._special.tokens.values(), *self._special.added_tokens]
            self._subwords = FastModel(f"{directory}/tokenizer.json", files["tokenizer.json"], named)
        else:
            self._subwords = SentencePieceModel(
                f"{directory}/tokenizer.model", files["tokenizer.model"], self._special.added_tokens
            )
        self.vocab_size = self._subwords.vocab_size
        self.bos_id = self._first_id("bos")
        self.eos_ids = self._read_eos_ids(directory)
        self.eos_id = self.eos_ids[0]
        # Any id of the vocabulary does for padding: rows carry their lengths, and nothing reads past them. So a model
        # without a padding token (or with one outside its embedding) pads with eos; its embedding is never resized.
        self.pad_id = self._read_pad_id()
        self._add_bos = self._read_add_bos()

    @classmethod
    def read(cls, directory: str | Path) -> Tokenizer:
        """From a directory with tokenizer.json (taken where both are there, as in transformers) or tokenizer.model."""
        directory = Path(directory)
        if not any((directory / name).is_file() for name in _VOCABULARY_FILES):
            raise ConfigError(f"{directory}: holds neither tokenizer.json nor tokenizer.model; set data.tokenizer")
        names = [name for name in (*_OWN_FILES, *JSON_FILES[3:]) if (directory / name).is_file()]
        return cls(str(directory), {name: (directory / name).read_bytes() for name in names})

    @property
    def has_chat_template(self) -> bool:
        return self._special.chat_template is not None

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """The library's own ids. Special tokens written in the text are recognised.

        `bos` puts the beginning-of-sequence token first where the model's tokenizer does so by itself; a text that
        already begins with it (a chat template may write it) gets no second one.
        """
        ids = self._subwords.encode(text)
        if bos and self._add_bos and ids[:1] != [self.bos_id]:
            assert self.bos_id is not None
            return [self.bos_id, *ids]
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of text that follows other text in a row: no beginning-of-sequence token, no space put before it."""
        return self._subwords.encode_continuation(text)

    def decode(self, ids: Sequence[int], *, after: Sequence[int] = ()) -> str:
        """The text of the ids, special tokens left out.

        With `after`, the text that the ids add to it: a space that separates the two is kept, where decoding the ids
        alone would drop it.
        """
        if not len(after):
            return self._subwords.decode(ids)
        before, whole = self._subwords.decode(after), self._subwords.decode([*after, *ids])
        # cut inside a character, the text before is not a prefix of the whole
        return whole[len(before) :] if whole.startswith(before) else self._subwords.decode(ids)

    def token(self, token_id: int) -> str:
        """How the vocabulary spells one id, special or not."""
        return self._subwords.token_of(token_id)

    def format_prompt(self, messages: Sequence[Message]) -> str:
        """A conversation up to where the assistant's reply begins: in the model's chat template where it has one, in
        the Human/Assistant form of HH-RLHF otherwise."""
        if self._special.chat_template is None:
            return format_dialogue(messages)
        return render_template(self._special.chat_template, messages, self._special_strings(), open_reply=True)

    def format_closed(self, messages: Sequence[Message]) -> str:
        """A conversation that ends in an assistant's turn, as the chat template writes it."""
        assert self._special.chat_template is not None
        return render_template(self._special.chat_template, messages, self._special_strings(), open_reply=False)

    def save(self, directory: str | Path) -> None:
        """Copy the tokenizer's files. A bare tokenizer.model gets a tokenizer_config.json beside it, without which
        transformers would guess another encoding (no space before the first word)."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name in _OWN_FILES:
            if name in self._files:
                (directory / name).write_bytes(self._files[name])
        if "tokenizer.json" not in self._files and "tokenizer_config.json" not in self._files:
            config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": self._add_bos, "add_eos_token": False}
            _write_json(directory / "tokenizer_config.json", {**config, **self._special_strings()})

    def save_for_transformers(self, directory: str | Path) -> None:
        """`save`, and where transformers would read tokenizer.model otherwise than sentencepiece, the tokenizer.json
        that it reads alike."""
        self.save(directory)
        if "tokenizer.json" in self._files:
            return
        strings = self._special_strings()
        text = as_tokenizer_json(self._files["tokenizer.model"], bos=strings["bos_token"] if self._add_bos else None)
        if text is not None:
            path = Path(directory) / "tokenizer_config.json"
            config = json.loads(path.read_text(encoding="utf-8"))
            (Path(directory) / "tokenizer.json").write_text(text, encoding="utf-8")
            _write_json(path, {**config, **strings, "tokenizer_class": "PreTrainedTokenizerFast"})

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
        named = {name: self._subwords.token_of(i) for name, i in known.items() if i is not None}
        return {**named, **self._special.tokens}


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
