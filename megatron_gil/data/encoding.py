"""Rows of text to token ids that fit: the oldest of a prompt goes first, the end of a reply goes last.

A prompt that is a conversation (messages, or text in the Human/Assistant form) loses whole exchanges, oldest first,
then the system text, and never its last question. What is still too long, or is no conversation, loses its oldest
tokens, the beginning-of-sequence token excepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_gil.data.chat import Message, format_turn, merge_neighbours, parse_dialogue, split_exchanges
from megatron_gil.data.tokenizer import Tokenizer

Prompt = str | Sequence[Message]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedRow:
    tokens: list[int]
    is_reply: list[bool]  # per token: it is the assistant's
    prompt_cut: bool  # lost turns or tokens at its start
    reply_cut: bool  # lost tokens at its end, the end-of-sequence token among them


def prompt_text(tokenizer: Tokenizer, prompt: Prompt) -> str:
    """What the model reads: messages are formatted, text stands as it is; but text in the Human/Assistant form is
    messages to a tokenizer that has a chat template."""
    if not isinstance(prompt, str):
        return tokenizer.format_prompt(prompt)
    messages = parse_dialogue(prompt) if tokenizer.has_chat_template else None
    return prompt if messages is None else tokenizer.format_prompt(messages)


def format_reply(tokenizer: Tokenizer, content: str) -> str:
    """An assistant's turn as it follows `format_prompt`: after "Assistant:" stands a space."""
    return content if tokenizer.has_chat_template else " " + content


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt, max_tokens: int) -> tuple[list[int], bool]:
    """At most `max_tokens` ids, beginning-of-sequence token included, and whether anything was cut."""
    ids = tokenizer.encode(prompt_text(tokenizer, prompt), bos=True)
    if len(ids) <= max_tokens:
        return ids, False
    messages = parse_dialogue(prompt) if isinstance(prompt, str) else prompt
    if messages is None:
        return _keep_end(tokenizer, ids, max_tokens), True
    ids = []
    for shorter in _shortest_first(messages):
        longer_ids = tokenizer.encode(tokenizer.format_prompt(shorter), bos=True)
        if ids and len(longer_ids) > max_tokens:
            break
        ids = longer_ids
    return _keep_end(tokenizer, ids, max_tokens), True


def encode_reply(tokenizer: Tokenizer, prompt: Prompt, reply: str, max_tokens: int) -> tuple[list[int], bool]:
    """The reply to `prompt` and an end-of-sequence token, at most `max_tokens` ids, and whether the end was cut.

    The space that precedes a reply in the Human/Assistant form is no part of it in a chat template.
    """
    if tokenizer.has_chat_template and (not isinstance(prompt, str) or parse_dialogue(prompt) is not None):
        reply = reply.lstrip()
    ids = tokenizer.encode_continuation(reply)
    if ids[-1:] != [tokenizer.eos_id]:
        ids = [*ids, tokenizer.eos_id]
    return ids[:max_tokens], len(ids) > max_tokens


def encode_replies(
    tokenizer: Tokenizer, prompt: Prompt, replies: Sequence[str], *, max_prompt_tokens: int, max_tokens: int
) -> list[EncodedRow]:
    """A row of prompt and reply for each of the replies."""
    prompt_ids, prompt_cut = encode_prompt(tokenizer, prompt, max_prompt_tokens)
    rows = []
    for reply in replies:
        reply_ids, reply_cut = encode_reply(tokenizer, prompt, reply, max_tokens - len(prompt_ids))
        is_reply = [False] * len(prompt_ids) + [True] * len(reply_ids)
        tokens = [*prompt_ids, *reply_ids]
        rows.append(EncodedRow(tokens=tokens, is_reply=is_reply, prompt_cut=prompt_cut, reply_cut=reply_cut))
    return rows


def encode_conversation(
    tokenizer: Tokenizer, messages: Sequence[Message], *, max_prompt_tokens: int, max_tokens: int
) -> EncodedRow:
    """A conversation whose every assistant turn is a reply.

    A chat template ends every reply with its own token. In the Human/Assistant form nothing ends the earlier ones (a
    prompt at generation time has none there either), and an end-of-sequence token follows the last.
    """
    messages = merge_neighbours(messages)
    whole = _encode_turns(tokenizer, messages)
    if whole is not None and len(whole[0]) <= max_tokens:
        return EncodedRow(tokens=whole[0], is_reply=whole[1], prompt_cut=False, reply_cut=False)
    fitting = None
    for shorter in _shortest_first(messages) if whole is not None else ():
        encoded = _encode_turns(tokenizer, shorter)
        if encoded is None or len(encoded[0]) > max_tokens:
            break
        fitting = encoded
    if fitting is not None:
        return EncodedRow(tokens=fitting[0], is_reply=fitting[1], prompt_cut=True, reply_cut=False)
    last_reply = format_reply(tokenizer, messages[-1]["content"])
    limits = {"max_prompt_tokens": max_prompt_tokens, "max_tokens": max_tokens}
    return encode_replies(tokenizer, messages[:-1], [last_reply], **limits)[0]


def _encode_turns(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool]] | None:
    """Ids and which are the assistant's; None for a chat template that rewrites earlier turns as more follow."""
    parts = _template_parts(tokenizer, messages) if tokenizer.has_chat_template else _plain_parts(messages)
    if parts is None:
        return None
    tokens: list[int] = []
    is_reply: list[bool] = []
    closed = False
    for text, written in parts:
        ids = tokenizer.encode_continuation(text) if tokens else tokenizer.encode(text, bos=True)
        # a template may write a line end after the token that ends the turn; the model never has to
        ends = [i + 1 for i, token in enumerate(ids) if token in tokenizer.eos_ids]
        closed, length = bool(ends), ends[-1] if ends else len(ids)
        tokens += ids
        is_reply += [written and i < length for i in range(len(ids))]
    return (tokens, is_reply) if closed else ([*tokens, tokenizer.eos_id], [*is_reply, True])


def _plain_parts(messages: Sequence[Message]) -> list[tuple[str, bool]]:
    """The Human/Assistant form in pieces: (text, whether the assistant wrote it)."""
    parts: list[tuple[str, bool]] = []
    between = ""
    for message in messages:
        if message["role"] == "assistant":
            parts += [(between + "\n\nAssistant:", False), (" " + message["content"], True)]
            between = ""
        else:
            between += format_turn(message)
    return parts


def _template_parts(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[tuple[str, bool]] | None:
    parts: list[tuple[str, bool]] = []
    text = ""
    for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        opened, closed = tokenizer.format_prompt(messages[:i]), tokenizer.format_closed(messages[: i + 1])
        if not opened.startswith(text) or not closed.startswith(opened):
            return None
        parts += [(opened[len(text) :], False), (closed[len(opened) :], True)]
        text = closed
    return parts


def _shortest_first(messages: Sequence[Message]) -> list[list[Message]]:
    """The last exchange; with the system text; with the exchange before; and so on, the whole left out."""
    system, exchanges = split_exchanges(messages)
    tails = [[m for exchange in exchanges[i:] for m in exchange] for i in range(len(exchanges) - 1, 0, -1)]
    last = tails[0] if tails else list(messages[len(system) :])
    return [last, *([*system, *tail] for tail in tails)] if system else (tails or [last])


def _keep_end(tokenizer: Tokenizer, ids: list[int], max_tokens: int) -> list[int]:
    if len(ids) <= max_tokens:
        return ids
    first = ids[:1] if ids[:1] == [tokenizer.bos_id] and max_tokens > 1 else []
    return first + ids[len(ids) - max_tokens + len(first) :]
