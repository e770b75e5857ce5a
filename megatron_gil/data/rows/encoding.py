"""Rows of text to token ids that fit. What does not fit is cut from the start of the prompt first, then from the end of
the response.

A prompt that is a conversation (messages, or text in the Human/Assistant form) loses whole exchanges, oldest first,
then the system text, and never its last question. A prompt that is still too long, or that is no conversation, loses
its oldest tokens; the beginning-of-sequence token stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_gil.data.text.chat import (
    ChatText,
    Message,
    format_dialogue,
    format_turn,
    merge_neighbours,
    parse_dialogue,
    split_exchanges,
)
from megatron_gil.data.text.tokenizer import Tokenizer

Prompt = str | Sequence[Message]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    tokens: list[int]
    num_tokens: int  # before any cut
    read: Prompt  # what is left of it

    @property
    def cut(self) -> bool:
        return len(self.tokens) < self.num_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedRow:
    tokens: list[int]
    is_response: list[bool]  # per token: it is the assistant's
    num_tokens: int  # before any cut
    prompt_cut: bool  # lost turns or tokens at its start
    response_cut: bool  # lost tokens at its end, the end-of-sequence token among them


def prompt_text(tokenizer: Tokenizer, prompt: Prompt) -> ChatText:
    """What the model reads: messages are formatted, text stands as it is; but text in the Human/Assistant form is
    messages to a tokenizer that has a chat template."""
    if not isinstance(prompt, str):
        return tokenizer.format_prompt(prompt)
    messages = parse_dialogue(prompt) if tokenizer.has_chat_template else None
    return ChatText(prompt) if messages is None else tokenizer.format_prompt(messages)


def format_response(tokenizer: Tokenizer, content: str) -> str:
    """An assistant's turn as it follows `format_prompt`: with a space before it, which separates it from
    "Assistant:"."""
    return content if tokenizer.has_chat_template else " " + content


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt, max_tokens: int) -> EncodedPrompt:
    """At most `max_tokens` ids, beginning-of-sequence token included."""
    whole = tokenizer.encode(prompt_text(tokenizer, prompt), bos=True)
    if len(whole) <= max_tokens:
        return EncodedPrompt(tokens=whole, num_tokens=len(whole), read=prompt)
    ids, kept = whole, None
    for shorter in _shortest_first(_turns(prompt)):
        longer_ids = tokenizer.encode(tokenizer.format_prompt(shorter), bos=True)
        if kept is not None and len(longer_ids) > max_tokens:
            break
        ids, kept = longer_ids, shorter
    tokens = _keep_end(tokenizer, ids, max_tokens)
    if kept is None or len(tokens) < len(ids):
        return EncodedPrompt(tokens=tokens, num_tokens=len(whole), read=tokenizer.decode(tokens))
    read = format_dialogue(kept) if isinstance(prompt, str) else kept
    return EncodedPrompt(tokens=tokens, num_tokens=len(whole), read=read)


def encode_response(tokenizer: Tokenizer, prompt: Prompt, response: str) -> list[int]:
    """The response to `prompt` and an end-of-sequence token.

    In the Human/Assistant form a space precedes the response; with a chat template that space is left out.
    """
    if tokenizer.has_chat_template and (not isinstance(prompt, str) or parse_dialogue(prompt) is not None):
        response = response.lstrip()
    return [*tokenizer.encode_continuation(response), tokenizer.eos_id]


def encode_responses(
    tokenizer: Tokenizer, prompt: Prompt, responses: Sequence[str], *, max_prompt_tokens: int, max_tokens: int
) -> list[EncodedRow]:
    """A row of prompt and response for each of the responses."""
    encoded = encode_prompt(tokenizer, prompt, max_prompt_tokens)
    rows = []
    for response in responses:
        response_ids = encode_response(tokenizer, prompt, response)
        tokens = [*encoded.tokens, *response_ids][:max_tokens]
        rows.append(
            EncodedRow(
                tokens=tokens,
                is_response=[False] * len(encoded.tokens) + [True] * (len(tokens) - len(encoded.tokens)),
                num_tokens=encoded.num_tokens + len(response_ids),
                prompt_cut=encoded.cut,
                response_cut=len(encoded.tokens) + len(response_ids) > max_tokens,
            )
        )
    return rows


def encode_conversation(
    tokenizer: Tokenizer, messages: Sequence[Message], *, max_prompt_tokens: int, max_tokens: int
) -> EncodedRow:
    """A conversation whose every assistant turn is a response.

    A chat template ends every response with its own token. In the Human/Assistant form nothing ends the earlier ones (a
    prompt at generation time has none there either), and an end-of-sequence token follows the last.
    """
    messages = merge_neighbours(messages)
    whole = _encode_turns(tokenizer, messages)
    if whole is not None and len(whole[0]) <= max_tokens:
        return EncodedRow(
            tokens=whole[0], is_response=whole[1], num_tokens=len(whole[0]), prompt_cut=False, response_cut=False
        )
    fitting = None
    for shorter in _shortest_first(messages) if whole is not None else ():
        encoded = _encode_turns(tokenizer, shorter)
        if encoded is None or len(encoded[0]) > max_tokens:
            break
        fitting = encoded
    if fitting is not None:
        assert whole is not None
        return EncodedRow(
            tokens=fitting[0], is_response=fitting[1], num_tokens=len(whole[0]), prompt_cut=True, response_cut=False
        )
    last_response = format_response(tokenizer, messages[-1]["content"])
    limits = {"max_prompt_tokens": max_prompt_tokens, "max_tokens": max_tokens}
    return encode_responses(tokenizer, messages[:-1], [last_response], **limits)[0]


def _encode_turns(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool]] | None:
    """(ids, whether each is the assistant's). None for a chat template that writes a turn in another way once more
    turns follow."""
    parts = _template_parts(tokenizer, messages) if tokenizer.has_chat_template else _plain_parts(messages)
    if parts is None:
        return None
    tokens: list[int] = []
    is_response: list[bool] = []
    closed = False
    for text, written in parts:
        ids = tokenizer.encode_continuation(text) if tokens else tokenizer.encode(text, bos=True)
        # a template may write a line end after the token that ends the turn; the model never has to
        ends = [i + 1 for i, token in enumerate(ids) if token in tokenizer.eos_ids]
        closed, length = bool(ends), ends[-1] if ends else len(ids)
        tokens += ids
        is_response += [written and i < length for i in range(len(ids))]
    return (tokens, is_response) if closed else ([*tokens, tokenizer.eos_id], [*is_response, True])


def _plain_parts(messages: Sequence[Message]) -> list[tuple[ChatText, bool]]:
    """The Human/Assistant form in pieces: (text, whether the assistant wrote it)."""
    parts: list[tuple[ChatText, bool]] = []
    between = ""
    for message in messages:
        if message["role"] == "assistant":
            parts += [(ChatText(between + "\n\nAssistant:"), False), (ChatText(" " + message["content"]), True)]
            between = ""
        else:
            between += format_turn(message)
    return parts


def _template_parts(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[tuple[ChatText, bool]] | None:
    parts: list[tuple[ChatText, bool]] = []
    text = ChatText("")
    for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        opened, closed = tokenizer.format_prompt(messages[:i]), tokenizer.format_closed(messages[: i + 1])
        if not opened.begins_with(text) or not closed.begins_with(opened):
            return None
        parts += [(opened.after(len(text.text)), False), (closed.after(len(opened.text)), True)]
        text = closed
    return parts


def _turns(prompt: Prompt) -> Sequence[Message]:
    """The turns of a conversation; an empty list for any other text."""
    return (parse_dialogue(prompt) or []) if isinstance(prompt, str) else prompt


def _shortest_first(messages: Sequence[Message]) -> list[list[Message]]:
    """Ever longer ends of a conversation, shorter than the whole: its last exchange; that with the system text;
    these with the exchange before; and so on."""
    if not messages:
        return []
    system, exchanges = split_exchanges(messages)
    tails = [[m for exchange in exchanges[i:] for m in exchange] for i in range(len(exchanges) - 1, 0, -1)]
    last = tails[0] if tails else list(messages[len(system) :])
    return [last, *([*system, *tail] for tail in tails)] if system else (tails or [last])


def _keep_end(tokenizer: Tokenizer, ids: list[int], max_tokens: int) -> list[int]:
    if len(ids) <= max_tokens:
        return ids
    first = ids[:1] if ids[:1] == [tokenizer.bos_id] and max_tokens > 1 else []
    return first + ids[len(ids) - max_tokens + len(first) :]
