"""Conversations as text: the Human/Assistant form of HH-RLHF, and a tokenizer's own chat template.

A message is {"role": "system" | "user" | "assistant", "content": text}. In the Human/Assistant form a conversation
that waits for a response reads

    [system text]\\n\\nHuman: question\\n\\nAssistant: response\\n\\nHuman: question\\n\\nAssistant:

and a response is written with the space that follows the colon.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from megatron_gil.config import ConfigError

Message = Mapping[str, str]
ROLES = ("system", "user", "assistant")

_SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_ROLE_OF = {"Human": "user", "Assistant": "assistant"}
_SPEAKER_OF = {"user": "Human", "assistant": "Assistant"}
_MARK = "\ufdd0"  # a code point that stands for no character, so no text should hold it


def split_turns(text: str) -> tuple[str, list[tuple[str, str]]]:
    """(the text before the first turn, (role, text after the colon) of every turn). Spaces are kept."""
    preamble, *rest = _SPEAKER.split(text)
    return preamble, [(_ROLE_OF[speaker], said) for speaker, said in zip(rest[::2], rest[1::2], strict=True)]


def parse_dialogue(text: str) -> list[Message] | None:
    """The messages of a prompt in the Human/Assistant form; None for any other text.

    Such a prompt begins with a human turn (or a system text) and ends in an empty Assistant turn.
    """
    preamble, turns = split_turns(text)
    if len(turns) < 2 or turns[0][0] != "user" or turns[-1][0] != "assistant" or turns[-1][1].strip():
        return None
    system = [{"role": "system", "content": preamble.strip()}] if preamble.strip() else []
    return [*system, *({"role": role, "content": said.strip()} for role, said in turns[:-1])]


def format_turn(message: Message) -> str:
    if message["role"] == "system":
        return message["content"]
    return f"\n\n{_SPEAKER_OF[message['role']]}: {message['content']}"


def format_dialogue(messages: Sequence[Message]) -> str:
    """The messages in the Human/Assistant form, up to where the assistant's response begins."""
    return "".join(map(format_turn, messages)) + "\n\nAssistant:"


def merge_neighbours(messages: Sequence[Message]) -> list[Message]:
    """The turns, with neighbouring ones by the same speaker joined into one, a blank line between their texts."""
    return [
        {"role": role, "content": "\n\n".join(message["content"] for message in turns)}
        for role, turns in groupby(messages, key=lambda message: message["role"])
    ]


def split_exchanges(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The leading system turns, and the rest cut before every user turn that follows an assistant's."""
    num_system = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    exchanges: list[list[Message]] = []
    for i, message in enumerate(messages[num_system:], start=num_system):
        if not exchanges or (message["role"] == "user" and messages[i - 1]["role"] == "assistant"):
            exchanges.append([])
        exchanges[-1].append(message)
    return list(messages[:num_system]), exchanges


@dataclass(frozen=True, slots=True)
class ChatText:
    """Text in which some spans are control tokens: those that the chat template wrote itself, none that stood in a
    message."""

    text: str
    controls: tuple[tuple[int, int], ...] = ()  # (start, end) of each in the text, in order

    def parts(self) -> Iterator[tuple[str, bool]]:
        """(text, False) and (control token, True), alternating; a text may be empty."""
        end = 0
        for start, stop in self.controls:
            yield self.text[end:start], False
            yield self.text[start:stop], True
            end = stop
        yield self.text[end:], False

    def begins_with(self, other: ChatText) -> bool:
        own = tuple(span for span in self.controls if span[0] < len(other.text))
        return self.text.startswith(other.text) and own == other.controls

    def after(self, length: int) -> ChatText:
        """The part after the first `length` characters."""
        spans = tuple((start - length, end - length) for start, end in self.controls if start >= length)
        return ChatText(self.text[length:], spans)


class ChatTemplate:
    """A tokenizer's own form of a conversation, in transformers' jinja sandbox.

    A control token that stands in a message is text; one that the template writes is a control token. To tell the two
    apart in the rendered text, the template is given messages with a mark inside every such token, and at both ends of
    each message's text.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], control_tokens: Collection[str]) -> None:
        """special_tokens: the names that the template may use, such as bos_token, and their tokens."""
        self._source, self._special_tokens = source, special_tokens
        any_token = "|".join(map(re.escape, sorted(control_tokens, key=len, reverse=True))) or r"(?!)"
        self._control_token = re.compile(f"({any_token})")
        self._first_of_token = re.compile(f"(?=(?:{any_token}))(.)", re.DOTALL)

    def render(self, messages: Sequence[Message], *, open_response: bool) -> ChatText:
        """The messages as the template writes them; `open_response` adds what precedes the assistant's next response.
        ConfigError where the template refuses the conversation."""
        messages = merge_neighbours(messages)
        mark = _MARK
        while any(mark in message["content"] for message in messages):
            mark += _MARK
        broken = [{**m, "content": self._first_of_token.sub(rf"\1{mark}", m["content"])} for m in messages]
        rendered = self._render(broken, open_response)
        fenced = self._render([{**m, "content": _fence(m["content"], mark)} for m in broken], open_response)
        if fenced.replace(mark, "") == rendered.replace(mark, ""):  # else the marks changed what it writes
            rendered = fenced
        text, spans = "", []
        for i, part in enumerate(self._control_token.split(rendered)):
            written = part.replace(mark, "")
            if i % 2:
                spans.append((len(text), len(text) + len(written)))
            text += written
        return ChatText(text, tuple(spans))

    def _render(self, messages: Sequence[Message], open_response: bool) -> str:
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        conversation, variables = [dict(message) for message in messages], dict[str, Any](self._special_tokens)
        try:
            rendered, _ = render_jinja_template(
                [conversation], chat_template=self._source, add_generation_prompt=open_response, **variables
            )
        except (TemplateError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"the tokenizer's chat template refuses this conversation: {reason}") from None
        return rendered[0]


def _fence(content: str, mark: str) -> str:
    """The message with a mark at both ends of its text. Spaces around the text stay outside of the marks, because
    templates strip them."""
    text = content.strip()
    return content.replace(text, f"{mark}{text}{mark}", 1) if text else content
