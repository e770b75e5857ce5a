"""The one reader of JSON Lines: lines end in \\n alone. str.splitlines() also cuts at U+2028, U+0085 and others, which
stand unescaped inside of JSON text."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from megatron_gil.config import ConfigError

LONGEST_ROW = 8 << 20
"""Bytes of a line, or characters of one text; far more than any model reads, and 2 s of tokenizing."""


class Line(NamedTuple):
    number: int  # from 1, blank lines counted
    content: bytes  # with its line end
    value: Any


def iter_jsonl(path: Path, *, growing: bool = False) -> Iterator[tuple[int, Any]]:
    """(line number, value) of every line that is not blank; a byte order mark is no part of a line.

    path: a name that ends in .gz is unpacked. growing: a last line without its line end, which is still being written
    or was when its writer died, is left out where it is not JSON. ConfigError names the file, and the line that is not
    UTF-8 or not JSON.
    """
    return ((line.number, line.value) for line in iter_lines(path, growing=growing))


def iter_lines(path: Path, *, growing: bool = False) -> Iterator[Line]:
    """The same with the bytes of each line."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, content in enumerate(iter(partial(file.readline, LONGEST_ROW + 1), b""), start=1):
                if len(content) > LONGEST_ROW:
                    raise ConfigError(
                        f"{path}:{number}: a row of more than {LONGEST_ROW >> 20} MiB; cut it into several"
                    )
                line = content.removeprefix(b"\xef\xbb\xbf")
                if not line.strip():
                    continue
                try:
                    yield Line(number, content, _parse(line, f"{path}:{number}"))
                except ConfigError:
                    if not growing or content.endswith(b"\n"):
                        raise
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def _parse(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not UTF-8 at byte {error.start + 1} of the line") from None
    except RecursionError:
        raise ConfigError(f"{where}: JSON nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ConfigError(f"{where}: not valid JSON: {error}") from None
