"""Rows that have the field names of training files already, or nearly so, such as TRL's conversational forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_gil.data.prepare.sources.example import Example, Origin, Tally, as_pair
from megatron_gil.data.prepare.sources.hh import read_hh
from megatron_gil.data.prepare.sources.sharegpt import read_messages, read_sharegpt
from megatron_gil.data.text.chat import format_dialogue


def read_jsonl(row: Mapping[str, Any], origin: Origin, tally: Tally) -> Example | None:
    """{"prompt"} with any of "completion" and "chosen", "rejected", kept as they are; or {"messages"}; either part may
    be a list of messages, and a preference without a prompt may be two conversations. "group" is kept."""
    example = _read(row, origin, tally)
    group = row.get("group")
    if example is None or group is None:
        return example
    if isinstance(group, bool) or not isinstance(group, str | int):
        tally.note("group neither text nor an integer left out")
        return example
    return replace(example, group=str(group))


def _read(row: Mapping[str, Any], origin: Origin, tally: Tally) -> Example | None:
    prompt = row.get("prompt")
    if isinstance(prompt, str) and not isinstance(row.get("chosen"), list):
        return _read_texts(prompt, row, tally)
    if isinstance(prompt, list) and not {"completion", "chosen"} & set(row):
        return _read_question(prompt, tally)
    if isinstance(prompt, list):
        completion = row.get("completion", [])
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        turns = [*prompt, *completion] if isinstance(completion, list) else prompt
        return read_sharegpt({**row, "messages": turns}, origin, tally)
    if isinstance(row.get("chosen"), str):
        return read_hh(row, replace(origin, name=""), tally)
    if isinstance(row.get("chosen"), list) and row["chosen"]:
        return read_sharegpt({**row, "messages": row["chosen"][:-1]}, origin, tally)
    return read_sharegpt(row, origin, tally)


def _read_question(turns: list[Any], tally: Tally) -> Example | None:
    messages = read_messages(turns, tally)
    if messages is not None and messages[-1]["role"] != "user":
        return tally.drop("a prompt that does not end in a question")
    return None if messages is None else Example(prompt=format_dialogue(messages))


def _read_texts(prompt: str, row: Mapping[str, Any], tally: Tally) -> Example | None:
    if not prompt.strip():
        return tally.drop("the prompt is empty")
    completion, chosen, rejected = (_text_or_none(row.get(name)) for name in ("completion", "chosen", "rejected"))
    if "completion" in row and completion is None:
        tally.drop("the completion is empty or no text", "demonstrations")
    pair = as_pair(chosen, rejected, tally) if "chosen" in row or "rejected" in row else (None, None)
    return Example(prompt=prompt, completion=completion, chosen=pair[0], rejected=pair[1])


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None
