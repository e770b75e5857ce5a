"""Who is who: links with a token, sessions in cookies, and forms that only our own pages can send.

All of it is derived from one key, in a file beside the ratings: links, sessions and open pages last over a restart, and
who has a copy of the ratings alone can make none of them. A new key makes all links new.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import secrets
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_gil.config import ConfigError

LONGEST_NAME = 40


@dataclass(frozen=True, slots=True)
class Access:
    key: bytes
    raters: Sequence[str]
    """Those who have a link; where there are none, raters name themselves."""

    def token(self, rater: str) -> str:
        return self._mac("token", rater)

    def rater_of(self, token: str) -> str | None:
        """In a time that does not depend on how much of a token is right."""
        found = None
        for rater in self.raters:
            if hmac.compare_digest(self.token(rater).encode(), token.encode()):
                found = rater
        return found

    @property
    def cookie_name(self) -> str:
        """Of this key: browsers send a cookie to every port of a machine."""
        return f"rater_{self._mac('cookie')[:8]}"

    def cookie(self, rater: str) -> str:
        """rater: empty for a visitor who has not said a name yet."""
        text = base64.urlsafe_b64encode(json.dumps([secrets.token_urlsafe(12), rater]).encode()).decode()
        return f"{text}.{self._mac('session', text)}"

    def rater_of_cookie(self, cookie: str) -> str | None:
        """None where we did not make it, or its rater is none any more."""
        text, _, mac = cookie.rpartition(".")
        if not hmac.compare_digest(self._mac("session", text).encode(), mac.encode()):
            return None
        rater = json.loads(base64.urlsafe_b64decode(text))[1]
        return rater if not self.raters or not rater or rater in self.raters else None

    def seal(self, cookie: str, *fields: str) -> str:
        """Of a form with these fields, in the page of the session with this cookie."""
        return self._mac("form", cookie, *fields)

    def is_sealed(self, seal: str, cookie: str, *fields: str) -> bool:
        return hmac.compare_digest(self.seal(cookie, *fields).encode(), seal.encode())

    def _mac(self, *parts: str) -> str:
        digest = hmac.digest(self.key, json.dumps(parts).encode(), hashlib.sha256)
        return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def read_key(path: Path) -> bytes:
    """The key of a file that its owner alone may read; made where there is none."""
    try:
        if not path.exists():
            _write_key(path, secrets.token_hex(32))
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise ConfigError(f"{path}: others may read this key, with which anyone can rate as anyone; chmod 600")
            content = file.read(100).strip()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    try:
        key = bytes.fromhex(content.decode("ascii"))
    except ValueError:
        key = b""
    if len(key) != 32:
        raise ConfigError(f"{path}: holds no key of 64 hexadecimal digits; remove it, and new links are made")
    return key


def _write_key(path: Path, key: str) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    beside.unlink(missing_ok=True)
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(key + "\n")
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def clean_name(text: str) -> str:
    """A rater's name with its spaces in order; ValueError says what is wrong with it."""
    try:
        name = " ".join(unicodedata.normalize("NFC", text).split())
        name.encode()
    except UnicodeEncodeError:
        raise ValueError("is not Unicode") from None
    if not name:
        raise ValueError("is empty")
    if len(name) > LONGEST_NAME:
        raise ValueError(f"has more than {LONGEST_NAME} characters")
    if not all(character.isprintable() for character in name):
        raise ValueError("holds characters that cannot be seen")
    return name
