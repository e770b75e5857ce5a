"""ShareGPT: {"conversations": [{"from", "value"}]}, with {"chosen", "rejected"} where it is a preference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_gil.data.prepare.sources.example import Example, Origin, Tally, as_pair, as_response
from megatron_gil.data.text.chat import Message, format_dialogue, merge_neighbours

_ROLE_OF = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "model"), "assistant"),
    "system": "system",
}

_UNUSED = ("tools", "system")
"""Fields of a row that are not read: the functions that the assistant could call, as in Glaive's data."""


def read_sharegpt(row: Mapping[str, Any], origin: Origin, tally: Tally) -> Example | None:
    """Turns may be written {"from", "value"} or {"role", "content"}, under "conversations" or "messages"."""
    messages = read_messages(row.get("conversations", row.get("messages")), tally)
    if messages is None:
        return None
    for name in _UNUSED:
        if row.get(name) not in (None, "", "[]", []):
            tally.note(f"field {name} left out")
    if "chosen" in row and "rejected" in row:
        return _read_preference(row, messages, tally)
    return from_conversation(messages, tally)


def from_conversation(messages: list[Message], tally: Tally) -> Example | None:
    """An example whose prompt is all before the last response."""
    if messages[-1]["role"] != "assistant":
        messages = messages[:-1]
        tally.note("question without a response cut from the end")
    if not any(message["role"] == "assistant" for message in messages):
        return tally.drop("no question with a response")
    tally.drop("no second response to compare", "preferences")
    completion = as_response(messages[-1]["content"], tally)
    return Example(prompt=format_dialogue(messages[:-1]), completion=completion, messages=messages)


def read_messages(turns: Any, tally: Tally) -> list[Message] | None:
    """The messages: a system text or none, then user and assistant in turn, the user first. None and a tallied
    reason for any other order."""
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        return tally.drop("no list of turns")
    messages: list[Message] = []
    for turn in turns:
        speaker, said = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        role = _ROLE_OF.get(speaker.lower()) if isinstance(speaker, str) else None
        if role is None or not isinstance(said, str):
            return tally.drop("a turn by an unknown speaker, or without text")
        messages.append({"role": role, "content": said.strip()})
    return _put_in_order(messages, tally)


def _put_in_order(messages: list[Message], tally: Tally) -> list[Message] | None:
    if not all(message["content"] for message in messages):
        return tally.drop("an empty turn")
    merged = merge_neighbours(messages)
    if len(merged) < len(messages):
        tally.note("turns in a row by one speaker merged")
    system = merged[:1] if merged[0]["role"] == "system" else []
    turns = merged[len(system) :]
    if any(turn["role"] == "system" for turn in turns):
        return tally.drop("a system turn after the first turn")
    if turns and turns[0]["role"] == "assistant":
        turns = turns[1:]
        tally.note("response without a question cut from the start")
    if not turns:
        return tally.drop("no question")
    if system:
        tally.note("system turn kept")
    return [*system, *turns]


def _read_preference(row: Mapping[str, Any], messages: list[Message], tally: Tally) -> Example | None:
    chosen, rejected = (_response_of(row[name], tally) for name in ("chosen", "rejected"))
    if messages[-1]["role"] != "user":
        return tally.drop("a preference whose prompt does not end in a question")
    if chosen is None:
        tally.drop("the response is empty", "demonstrations")
    pair = as_pair(chosen, rejected, tally)
    whole = None if chosen is None else [*messages, {"role": "assistant", "content": chosen.strip()}]
    prompt = format_dialogue(messages)
    return Example(prompt=prompt, completion=chosen, messages=whole, chosen=pair[0], rejected=pair[1])


def _response_of(turn: Any, tally: Tally) -> str | None:
    """The text of a response, which may be given as text, as a turn, or as a list of turns that ends in it; None for
    anything else."""
    if isinstance(turn, list) and turn:
        turn = turn[-1]
    if isinstance(turn, Mapping):
        turn = turn.get("value", turn.get("content"))
    return as_response(turn, tally) if isinstance(turn, str) else None
