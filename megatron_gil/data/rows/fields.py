"""What a row of a training file must hold.

| kind | a row has | and may have |
|---|---|---|
| prompts | prompt, or messages | group |
| demonstrations | prompt and completion, or messages that end in an assistant's turn | group |
| responses | prompt and response (the one text that may be empty) | messages (the same prompt), group |
| preferences | prompt, chosen, rejected | group |
| texts | text, or what demonstrations have | group |

`group` is a known label, text or an integer, for analysis. Other fields travel with the row where somebody asks for
them: `generate`, which writes them on, and a reward that is a function.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from megatron_gil.config import ConfigError
from megatron_gil.data.text.chat import ROLES, format_dialogue
from megatron_gil.jsonl import LONGEST_ROW

COLUMNS = ("prompt", "completion", "chosen", "rejected", "text", "messages", "group")

OTHERS = "others"
"""The column of a row's other fields, as JSON."""
RESPONSES = {"responses": ("response",), "preferences": ("chosen", "rejected")}
"""The fields of the responses that rows of a kind come with."""
OURS = (*COLUMNS, "response", "prompt_read", "score", "score_chosen", "score_rejected")
"""Fields that mean something in the files that we write."""
LARGEST = float(np.finfo(np.float32).max)
"""Of a score, which is float32, and of a trusted number: squares and sums of them stay within float64."""

Row = dict[str, Any]


def check_record(record: Any, kind: str, where: str) -> Row:
    """The row under the names of COLUMNS, None where it has no such field; a response becomes a completion.

    `where` (file:line) begins the message of a ConfigError.
    """
    if not isinstance(record, Mapping):
        raise ConfigError(f'{where}: a row is an object like {{"prompt": "..."}}, found {_type_name(record)}')
    row: Row = dict.fromkeys(COLUMNS)
    row.update(_CHECKS[kind](record, where), group=_check_group(record, where))
    return row


def other_fields(record: Mapping[str, Any], kind: str, where: str) -> str:
    """Every field of a checked row but its prompt and its responses, as JSON. What has no form in JSON, such as a date
    of a Parquet file, becomes text."""
    read, texts = ("prompt", *RESPONSES.get(kind, ())), []
    for name, value in record.items():
        if name in read or value is None:  # a Parquet row has every column
            continue
        text = f"{json.dumps(name, ensure_ascii=False)}: {json.dumps(value, ensure_ascii=False, default=str)}"
        if not _is_unicode(text):
            raise ConfigError(f"{where}: field {name!a} holds half of a surrogate pair, which is no character")
        texts.append(text)
    return f"{{{', '.join(texts)}}}"


def scored_kind(record: Any) -> str:
    """Of a row that is to be scored: preferences where it has a pair of responses and no single one, else
    responses."""
    if not isinstance(record, Mapping) or record.get("response") is not None:
        return "responses"
    return "responses" if record.get("chosen") is None and record.get("rejected") is None else "preferences"


def iter_texts(row: Row) -> Iterator[str]:
    """Every text of a checked row, its label left out."""
    yield from (row[name] for name in COLUMNS if name not in ("messages", "group") and row[name] is not None)
    yield from (message["content"] for message in row["messages"] or ())


def _check_prompt_row(record: Mapping[str, Any], where: str) -> Row:
    if _has_messages(record):
        return {"messages": _check_messages(record, where)}
    return _check_texts(record, ("prompt",), where)


def _check_demonstration(record: Mapping[str, Any], where: str) -> Row:
    if not _has_messages(record):
        return _check_texts(record, ("prompt", "completion"), where)
    messages = _check_messages(record, where)
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise ConfigError(f"{where}: field messages: the last turn must be the assistant's response to another turn")
    return {"messages": messages}


def _check_response(record: Mapping[str, Any], where: str) -> Row:
    if scored_kind(record) == "preferences":
        raise ConfigError(f"{where}: a pair {{chosen, rejected}} among responses; a file holds one kind, split it")
    row: Row = _check_texts(record, ("prompt",), where)
    if record.get("messages") is not None:
        messages = _check_messages(record, where)
        if format_dialogue(messages) == row["prompt"]:  # else it is another program's field, and not the prompt
            row["messages"] = messages
    return {**row, "completion": _check_text(record.get("response"), "response", where, empty=True)}


def _check_preference(record: Mapping[str, Any], where: str) -> Row:
    if record.get("response") is not None and record.get("chosen") is None and record.get("rejected") is None:
        raise ConfigError(f"{where}: a response among pairs {{chosen, rejected}}; a file holds one kind, split it")
    return _check_texts(record, ("prompt", "chosen", "rejected"), where)


def _check_text_row(record: Mapping[str, Any], where: str) -> Row:
    has_text = record.get("text") is not None
    return _check_texts(record, ("text",), where) if has_text else _check_demonstration(record, where)


def _has_messages(record: Mapping[str, Any]) -> bool:
    """A Parquet row has every column: an absent field is a null."""
    return record.get("prompt") is None and record.get("messages") is not None


_CHECKS: Mapping[str, Callable[[Mapping[str, Any], str], Row]] = {
    "prompts": _check_prompt_row,
    "demonstrations": _check_demonstration,
    "responses": _check_response,
    "preferences": _check_preference,
    "texts": _check_text_row,
}


def _check_texts(record: Mapping[str, Any], names: tuple[str, ...], where: str) -> Row:
    return {name: _check_text(record.get(name), name, where) for name in names}


def _check_text(value: Any, name: str, where: str, *, empty: bool = False) -> str:
    if value is None:
        raise ConfigError(f"{where}: field {name} is missing")
    if not isinstance(value, str):
        raise ConfigError(f"{where}: field {name} must be text, found {_type_name(value)}")
    if len(value) > LONGEST_ROW:
        raise ConfigError(f"{where}: field {name} has {len(value)} characters, more than {LONGEST_ROW}; cut it")
    if not empty and not value.strip():
        raise ConfigError(f"{where}: field {name} is empty")
    if not _is_unicode(value):
        raise ConfigError(f"{where}: field {name} holds half of a surrogate pair, which is no character")
    return value


def _check_messages(record: Mapping[str, Any], where: str) -> list[dict[str, str]]:
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f"{where}: field messages must be a list of turns, found {_type_name(messages)}")
    return [_check_message(message, f"messages[{i}]", where) for i, message in enumerate(messages)]


def _check_message(message: Any, name: str, where: str) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise ConfigError(f'{where}: field {name} must be {{"role": ..., "content": ...}}, found {_type_name(message)}')
    role = message.get("role")
    if role not in ROLES:
        raise ConfigError(f"{where}: field {name}.role must be one of {', '.join(ROLES)}, found {role!r:.50}")
    return {"role": role, "content": _check_text(message.get("content"), f"{name}.content", where)}


def _check_group(record: Mapping[str, Any], where: str) -> str | None:
    group = record.get("group")
    if group is None:
        return None
    if isinstance(group, bool) or not isinstance(group, str | int):
        raise ConfigError(f"{where}: field group must be text or an integer, found {_type_name(group)}")
    return _check_text(str(group), "group", where)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _type_name(value: Any) -> str:
    """The JSON name of a value's type."""
    names = {type(None): "null", bool: "true or false", str: "text", list: "a list", dict: "an object"}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"the number {value!r:.30}"
    return names.get(type(value), type(value).__name__)


def as_float(value: Any) -> float:
    """inf where the number is beyond float64, as a large int may be."""
    try:
        return float(value)
    except OverflowError:
        return math.inf
