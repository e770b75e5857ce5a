"""Conversations as text: the Human/Assistant form of HH-RLHF, and a tokenizer's own chat template.

A message is {"role": "system" | "user" | "assistant", "content": text}. In the Human/Assistant form a conversation
that waits for a reply reads

    [system text]\\n\\nHuman: question\\n\\nAssistant: reply\\n\\nHuman: question\\n\\nAssistant:

and a reply is written with the space that follows the colon.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from megatron_gil.config import ConfigError

Message = Mapping[str, str]
ROLES = ("system", "user", "assistant")

_SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_ROLE_OF = {"Human": "user", "Assistant": "assistant"}
_SPEAKER_OF = {"user": "Human", "assistant": "Assistant"}


def split_turns(text: str) -> tuple[str, list[tuple[str, str]]]:
    """The text before the first turn, and (role, text after the colon) of every turn, nothing stripped."""
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
    """The messages in the Human/Assistant form, up to where the assistant's reply begins."""
    return "".join(map(format_turn, messages)) + "\n\nAssistant:"


def merge_neighbours(messages: Sequence[Message]) -> list[Message]:
    """Turns in a row by one speaker made one, a blank line between them."""
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


def render_template(
    template: str, messages: Sequence[Message], special_tokens: Mapping[str, str], *, open_reply: bool
) -> str:
    """The messages as the chat template writes them; `open_reply` adds what precedes the assistant's next reply.

    The template runs in transformers' jinja sandbox. ConfigError where the template refuses the conversation.
    """
    from jinja2.exceptions import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    conversation = [dict(message) for message in merge_neighbours(messages)]
    variables: dict[str, Any] = dict(special_tokens)
    try:
        rendered, _ = render_jinja_template(
            [conversation], chat_template=template, add_generation_prompt=open_reply, **variables
        )
    except (TemplateError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"the tokenizer's chat template refuses this conversation: {reason}") from None
    return rendered[0]
