"""Anthropic HH-RLHF: {"chosen", "rejected"}, two conversations that should differ in the last response alone."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from megatron_gil.data.prepare.sources.example import Example, Origin, Tally, as_pair, as_response, texts_of
from megatron_gil.data.text.chat import split_turns

_RESPONSE = "\n\nAssistant:"
_DOUBLED = "two turns in a row by one speaker"
_GROUPS = ("helpful", "harmless")


def read_hh(row: Mapping[str, Any], origin: Origin, tally: Tally) -> Example | None:
    """The group is helpful or harmless where the file's path says so."""
    texts = texts_of(row, "chosen", "rejected")
    if texts is None:
        return tally.drop("no text under chosen and rejected")
    if not all(map(_is_dialogue, texts)):
        return tally.drop("not a Human/Assistant conversation")
    (prompt, chosen), (rejected_prompt, rejected) = (_split_response(text, tally) for text in texts)
    doubled = _repeats_speaker(texts[0])
    pair: tuple[str, str] | tuple[None, None] = (None, None)
    if prompt != rejected_prompt:
        tally.drop("the two prompts differ", "preferences")
    elif doubled:
        tally.drop(_DOUBLED, "preferences")
    else:
        pair = as_pair(chosen, rejected, tally)
    if doubled:
        tally.drop(_DOUBLED, "prompts")
        return tally.drop(_DOUBLED, "demonstrations")
    if chosen is None:
        tally.drop("the response is empty", "demonstrations")
    group = next((group for group in _GROUPS if group in origin.name.lower()), None)
    return Example(prompt=prompt, completion=chosen, chosen=pair[0], rejected=pair[1], group=group)


def _is_dialogue(text: str) -> bool:
    preamble, turns = split_turns(text)
    return not preamble.strip() and len(turns) >= 2 and turns[0][0] == "user" and turns[-1][0] == "assistant"


def _repeats_speaker(text: str) -> bool:
    return any(a == b for (a, _), (b, _) in pairwise(split_turns(text)[1]))


def _split_response(text: str, tally: Tally) -> tuple[str, str | None]:
    end = text.rindex(_RESPONSE) + len(_RESPONSE)
    return text[:end], as_response(text[end:], tally)
