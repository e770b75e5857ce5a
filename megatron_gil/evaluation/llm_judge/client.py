"""One request to an OpenAI-compatible server (the `openai` package). Whatever it does comes back as a value."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from megatron_gil.config import ConfigError
from megatron_gil.evaluation.llm_judge.failures import Failure, failure_of, one_line, unreadable
from megatron_gil.evaluation.llm_judge.prompts import encodable

OPENAI_URL = "https://api.openai.com/v1"
SHORTEST_SECRET = 8
"""Characters. A shorter key ("none", "EMPTY") is no secret."""
_CONNECT_S = 10.0
_NOT_SENT = ("ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol", "ProxyError")
"""Causes of a failed connection by which the server got no request; httpx and httpx2 name them alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    text: str
    is_cut: bool
    """At the limit on tokens."""
    refusal: str
    """Why the model gave no answer; empty where it did."""
    tokens_in: int | None
    """None where the server does not count."""
    tokens_out: int | None


@dataclass(frozen=True, slots=True)
class _Parameters:
    """What this server takes."""

    limit: str = "max_tokens"
    temperature: bool = True


class ChatClient:
    """Of one model on one server. The key is kept here alone, and taken out of all that the server says."""

    def __init__(self, *, model: str, base_url: str, timeout_s: float, say: Callable[[str], None]) -> None:
        """timeout_s: of a whole request. say: takes a line for the user. ConfigError where there is no key."""
        self.model, self.base_url = model, base_url
        self._key = read_key(needed=self.base_url == OPENAI_URL)
        self._timeout_s, self._say = timeout_s, say
        self._parameters = _Parameters()
        self._client = self._open()

    def _open(self) -> Any:
        try:
            import openai
        except ImportError:
            raise ConfigError("--judge llm needs the openai package: pip install openai") from None
        self._openai: Any = openai
        client = openai.AsyncOpenAI(
            api_key=self._key or "none",  # a server of the user's own needs none, but the package does
            base_url=self.base_url,
            max_retries=0,
            timeout=openai.Timeout(self._timeout_s, connect=min(_CONNECT_S, self._timeout_s)),
        )
        self._create = client.chat.completions.with_raw_response.create
        return client

    async def close(self) -> None:
        await self._client.close()

    async def complete(
        self, instruction: str, message: str, *, temperature: float, max_tokens: int
    ) -> Completion | Failure:
        messages = [{"role": "system", "content": instruction}, {"role": "user", "content": message}]
        while True:
            sent = self._parameters
            parameters: dict[str, float] = {sent.limit: max_tokens}
            if sent.temperature:
                parameters["temperature"] = temperature
            # in extra_body, which the package sends as it is: older ones know no max_completion_tokens
            result = await self._send(messages=messages, extra_body=parameters)
            if not isinstance(result, Failure) or not self._adapt(sent, result):
                return result

    def _adapt(self, sent: _Parameters, failure: Failure) -> bool:
        """Whether the request can be sent again with other parameters, which from now on all requests have."""
        if failure.kind == "max_tokens" and sent.limit == "max_tokens":
            adapted, line = replace(sent, limit="max_completion_tokens"), "max_completion_tokens in place of max_tokens"
        elif failure.kind == "temperature" and sent.temperature:
            adapted, line = replace(sent, temperature=False), "no temperature, which is the model's own then"
        else:
            return False
        if self._parameters == sent:  # else another request was faster
            self._parameters = adapted
            self._say(f"judge model {self.model} takes {line}")
        return True

    async def _send(self, **parameters: Any) -> Completion | Failure:
        openai = self._openai
        try:
            async with asyncio.timeout(self._timeout_s):  # a server may send a byte now and then for ever
                raw = await self._create(model=self.model, **parameters)
            response = raw.http_response
            return self._read(200, response.headers, self._text(response))
        except (TimeoutError, openai.APITimeoutError) as error:
            sent = type(error.__cause__).__name__ not in _NOT_SENT
            reason = f"no answer within {self._timeout_s:g} s" if sent else "the server cannot be reached in time"
            return Failure(kind="slow" if sent else "failed", reason=reason, may_be_billed=sent)
        except openai.APIStatusError as error:
            return self._read(error.response.status_code, error.response.headers, self._text(error.response))
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            sent = type(cause).__name__ not in _NOT_SENT
            told = self._without_key(one_line(str(cause) or type(cause).__name__))
            reason = f"the connection broke: {told}" if sent else f"the server cannot be reached: {told}"
            return Failure(kind="failed", reason=reason, may_be_billed=sent)
        except openai.OpenAIError as error:
            return Failure(kind="failed", reason=self._without_key(one_line(str(error))), may_be_billed=True)

    def _text(self, response: Any) -> str:
        return self._without_key(response.content.decode("utf-8", "replace"))

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[the key]") if len(self._key) >= SHORTEST_SECRET else text

    def _read(self, status: int, headers: Any, content: str) -> Completion | Failure:
        result = read_completion(content) if status == 200 else failure_of(status, headers, content)
        if isinstance(result, Failure):  # escapes of JSON are undone now: the key may show again
            return replace(result, reason=self._without_key(result.reason))
        return replace(result, text=self._without_key(result.text), refusal=self._without_key(result.refusal))


def read_completion(content: str) -> Completion | Failure:
    """The first choice of a body with status 200."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        return Failure(kind="failed", reason=unreadable(content), may_be_billed=True)
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        if body.get("error"):  # some relays say so with status 200
            code = body["error"].get("code") if isinstance(body["error"], dict) else None
            return failure_of(code if isinstance(code, int) and 400 <= code < 600 else 502, {}, content)
        return Failure(kind="failed", reason="an answer without choices", may_be_billed=True)
    ended = str(choice.get("finish_reason") or "")
    message = choice.get("message")
    message = message if isinstance(message, dict) else {}
    text, refusal = _text_of(message.get("content")), message.get("refusal")
    if ended.startswith("content_filter"):
        refusal = "stopped by the server's content filter"
    elif not isinstance(refusal, str):
        refusal = ""
    if text is None and ended != "length" and not refusal:
        return Failure(kind="failed", reason="an answer without text", may_be_billed=True)
    usage = body.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Completion(
        text=encodable(text or ""),
        is_cut=ended == "length",
        refusal=encodable(refusal),
        tokens_in=_count(usage.get("prompt_tokens")),
        tokens_out=_count(usage.get("completion_tokens")),
    )


def _text_of(content: Any) -> str | None:
    """Some servers give parts, thoughts among them."""
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(part for part in parts if isinstance(part, str)) or None
    return content if isinstance(content, str) else None


def _count(number: Any) -> int | None:
    return number if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 10**12 else None


def server_url(given: str | None) -> str:
    """The one given, or that of the environment, or OpenAI's. ConfigError where it is none, or holds what must not be
    printed or kept."""
    url = given or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        parts, host = None, None
    if parts is None or parts.scheme not in ("http", "https") or not host or not _is_sendable(url):
        raise ConfigError(f"--base-url {one_line(url)!r} is no URL; give one like http://127.0.0.1:8000/v1")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ConfigError(
            "--base-url holds a name, a password, a query or a fragment, which would be kept and printed with it; "
            "give the key in OPENAI_API_KEY"
        )
    return url.rstrip("/")


def _is_sendable(url: str) -> bool:
    return url.isascii() and url.isprintable() and " " not in url and len(url) < 2000


def read_key(*, needed: bool) -> str:
    """From the environment; ConfigError, without it, where it is needed and absent, or cannot be sent."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if needed and not key:
        raise ConfigError("--judge llm has no key: set OPENAI_API_KEY, or give --base-url")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            "OPENAI_API_KEY holds characters that no key has (a line end, a quotation mark?); set it anew"
        )
    return key
