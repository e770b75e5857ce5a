"""What a server says instead of an answer, and what follows from it."""

from __future__ import annotations

import email.utils
import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal[
    "limited", "busy", "failed", "slow", "rejected", "refused", "too_long", "user", "max_tokens", "temperature"
]
"""limited: too many requests for now. busy: turned away for now. failed, slow: no answer, in time or whole. rejected:
not this request. refused, too_long: not this text. user: no request of this user's, until the key, the model, the URL
or the account is put right. max_tokens, temperature: not with this parameter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    kind: Kind
    reason: str
    wait_s: float | None = None
    """The pause that the server asks for."""
    may_be_billed: bool = False
    """The model may have written an answer that did not arrive."""


_TOO_LONG = re.compile(
    r"context.?(length|size|window)|maximum context|reduce the length"
    r"|(prompt|input|text|request)[\w ]* (is )?too (long|large)"
    r"|string_above_max_length|too many (input )?tokens|exceeds? the (maximum|max|limit)[\w ]* (tokens|length)",
    re.I,
)
_REFUSED = re.compile(
    r"content.?(filter|policy|management|moderation)|content_blocked|flagged|safety system|responsible.?ai|"
    r"invalid_prompt|prompt_blocked|usage polic|moderation",
    re.I,
)
_ACCOUNT = re.compile(
    r"insufficient.?(quota|balance|credit|funds)|credit balance|billing_(hard_limit|not_active)", re.I
)
_KEY = re.compile(r"api.?key", re.I)
_MODEL = re.compile(
    r"model_not_found|invalid_model|unknown model|invalid model|no such model|model\b.{0,200}?\b(not exist|not found)",
    re.I | re.S,
)
_UNSUPPORTED = re.compile(
    r"unsupported|not support|unrecognized|unknown|unexpected|extra (inputs|fields)|not (permitted|allowed)|deprecated"
    r"|only the default",
    re.I,
)


def one_line(text: str, most: int = 300) -> str:
    """Without line ends and what else a terminal does not print, cut."""
    shown = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return shown if len(shown) <= most else f"{shown[:most]}..."


def failure_of(status: int, headers: Mapping[str, str], content: str) -> Failure:
    """Of an answer with a status that is none of success."""
    error = error_in(content)
    told = one_line(str(error.get("message") or ""))
    said = f"{status} {told}" if told else f"{status}{_page(content)}"
    every = " ".join(str(error.get(field) or "") for field in ("code", "type", "param", "message"))
    if status == 402 or _ACCOUNT.search(every):
        return Failure(kind="user", reason=f"{said}; the account has nothing left to spend: see to it, or take another")
    if status in (429, 503, 529):
        return Failure(kind="limited" if status == 429 else "busy", reason=said, wait_s=retry_after_s(headers))
    if status in (408, 409, 425) or status >= 500:
        return Failure(kind="failed", reason=said, wait_s=retry_after_s(headers))
    if status == 413:
        return Failure(kind="too_long", reason=f"too long for the judge: {said}")
    if status in (400, 422):
        return _of_bad_request(error, every, said)
    if status == 403 and _REFUSED.search(every):
        return Failure(kind="refused", reason=f"not judged by its rules: {said}")
    if status in (401, 403, 407):
        return Failure(kind="user", reason=f"{said}; check the key in OPENAI_API_KEY and what it may use")
    if status == 404 and _MODEL.search(every):
        return Failure(kind="user", reason=f"{said}; check --model")
    if status in (404, 405) or status < 400:
        return Failure(kind="user", reason=f"{said}; check --base-url (most end in /v1) and --model")
    return Failure(kind="rejected", reason=said)


def _of_bad_request(error: Mapping[str, Any], every: str, said: str) -> Failure:
    if _TOO_LONG.search(every):
        return Failure(kind="too_long", reason=f"too long for the judge: {said}")
    for parameter in ("max_tokens", "temperature"):
        if (error.get("param") == parameter or parameter in every) and _UNSUPPORTED.search(every):
            return Failure(kind=parameter, reason=said)
    if _REFUSED.search(every):
        return Failure(kind="refused", reason=f"not judged by its rules: {said}")
    if _KEY.search(every):
        return Failure(kind="user", reason=f"{said}; check the key in OPENAI_API_KEY")
    if _MODEL.search(every):
        return Failure(kind="user", reason=f"{said}; check --model")
    return Failure(kind="rejected", reason=said)


def error_in(content: str) -> Mapping[str, Any]:
    """{"error": {"message", "code", "type", "param"}}, or what else servers make of it."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(body, dict):
        return {"message": body} if isinstance(body, str) else {}
    error = body.get("error", body.get("detail", body))
    return error if isinstance(error, dict) else {"message": error if isinstance(error, str) else json.dumps(error)}


def _page(content: str) -> str:
    start = content.lstrip()[:200].lower()
    if start.startswith(("<!doctype", "<html", "<head", "<?xml")):
        return ", an HTML page"
    return f" {one_line(content, 100)}" if start else ", nothing else"


def unreadable(content: str) -> str:
    """What an answer with status 200 is that holds no JSON object."""
    if not content.strip():
        return "an empty answer"
    page = _page(content)
    return "an HTML page (most URLs end in /v1)" if "HTML" in page else f"no JSON object:{page}"


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """The pause asked for, in milliseconds, in seconds or as a date; None where it is not, or not to be read."""
    for name, unit_s in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            wait_s = float(headers.get(name, "")) * unit_s
        except ValueError:
            continue
        if not math.isnan(wait_s):
            return max(0.0, wait_s)
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
        return max(0.0, date.timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
