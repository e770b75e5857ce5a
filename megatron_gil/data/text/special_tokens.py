"""What the files of a model directory, apart from the vocabulary itself, say about special tokens."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_gil.config import ConfigError

JSON_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "config.json",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """From tokenizer_config.json, special_tokens_map.json and added_tokens.json (tokens), generation_config.json and
    config.json (ids)."""

    tokens: Mapping[str, str]  # "bos_token", "eos_token", "pad_token", "unk_token" -> token, where one is named
    ids: Mapping[str, tuple[int, ...]]  # "bos", "eos", "pad" -> ids the model's configs name, most specific file first
    added_tokens: Mapping[str, int]
    added_are_special: Mapping[str, bool]  # whether each is special, as far as tokenizer_config.json says
    named: frozenset[str]  # every token that a file gives a role: `tokens` and additional_special_tokens
    add_bos: bool | None  # add_bos_token, where tokenizer_config.json says it
    chat_template: str | None
    embedding_size: int | None  # vocab_size of config.json

    def is_control(self, token: str, *, is_special: bool, beside: Collection[str]) -> bool:
        """Whether an added token is a control token: text never makes it, and decoded text leaves it out. It is one if
        its tokenizer calls it special, if it has a role, or if the chat template writes it. Among the last a pair like
        <think> and </think> is not: it stands inside of responses, as text. beside: all the added tokens.
        """
        if is_special or token in self.named:
            return True
        return token in (self.chat_template or "") and not _is_tag(token, beside)


def read_special_tokens(directory: str, files: Mapping[str, bytes]) -> SpecialTokens:
    """`files` maps names to contents. ConfigError names a file that is not a JSON object."""
    parsed = {name: _parse_optional(directory, files, name) for name in JSON_FILES}
    tokenizer_config, special_map = parsed["tokenizer_config.json"], parsed["special_tokens_map.json"]
    tokens = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = _content(tokenizer_config.get(name)) or _content(special_map.get(name))
        if token is not None:
            tokens[name] = token
    model_configs = [parsed["generation_config.json"], parsed["config.json"]]
    decoder = _read_decoder(directory, tokenizer_config)
    added = {_content(token): i for i, token in decoder.items()}
    flags = {_content(t): t["special"] for t in decoder.values() if isinstance(t, dict) and "special" in t}
    for token, i in parsed["added_tokens.json"].items():
        if not _is_count(i):
            raise ConfigError(
                f"{directory}/added_tokens.json: the id of {token!r} must be a whole number from 0, found {i!r}"
            )
        added[token] = i
    listed = [*_list(tokenizer_config), *_list(special_map)]
    add_bos = tokenizer_config.get("add_bos_token")
    has_none = "bos_token" in tokenizer_config and "bos_token" not in tokens  # Qwen's; its config.json names another
    bos = () if has_none else _ids(model_configs, "bos_token_id")
    return SpecialTokens(
        tokens=tokens,
        ids={"bos": bos, **{name: _ids(model_configs, f"{name}_token_id") for name in ("eos", "pad")}},
        added_tokens={token: i for token, i in added.items() if token},
        added_are_special={token: bool(special) for token, special in flags.items() if token},
        named=frozenset([*tokens.values(), *(token for token in map(_content, listed) if token)]),
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        chat_template=_chat_template(directory, tokenizer_config, files),
        embedding_size=_read_embedding_size(directory, parsed["config.json"]),
    )


def _parse_optional(directory: str, files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        value = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{directory}/{name}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{directory}/{name}: must hold a JSON object, found {type(value).__name__}")
    return value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _read_decoder(directory: str, tokenizer_config: dict[str, Any]) -> dict[int, Any]:
    """Id -> token, as text or with its flags."""
    decoder = tokenizer_config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict) or not all(i.isascii() and i.isdigit() for i in decoder):
        raise ConfigError(f"{directory}/tokenizer_config.json: added_tokens_decoder must map ids to tokens")
    return {int(i): token for i, token in decoder.items()}


def _read_embedding_size(directory: str, config: dict[str, Any]) -> int | None:
    size = config.get("vocab_size")
    if size is not None and not _is_count(size):
        raise ConfigError(f"{directory}/config.json: vocab_size must be a whole number, found {size!r}")
    return size


def _content(token: Any) -> str | None:
    """A token is written as text or as {"content": text, ...}; null and empty mean none."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _list(config: dict[str, Any]) -> list[Any]:
    tokens = config.get("additional_special_tokens") or config.get("extra_special_tokens")
    return tokens if isinstance(tokens, list) else []


def _is_tag(token: str, tokens: Collection[str]) -> bool:
    name = token.removeprefix("<").removeprefix("/").removesuffix(">")
    return name.isidentifier() and {f"<{name}>", f"</{name}>"} <= set(tokens)


def _ids(configs: list[dict[str, Any]], key: str) -> tuple[int, ...]:
    """Every id under `key`, one or a list, in order, without repeats."""
    found: list[int] = []
    for config in configs:
        value = config.get(key)
        found += value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(i for i in found if isinstance(i, int) and i >= 0))


def _chat_template(directory: str, tokenizer_config: dict[str, Any], files: Mapping[str, bytes]) -> str | None:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode("utf-8", errors="replace")
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):  # several, by name
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise ConfigError(
            f"{directory}/tokenizer_config.json: chat_template must be text, or a list of named templates"
        )
    return template
