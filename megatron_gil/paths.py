"""Paths that a user gives, and files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path


def expand_user(path: str | Path) -> Path:
    """The path with a leading ~ or ~USER replaced, which a shell does only where a word begins with it.

    ValueError where there is no such user.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"{path}: there is no home directory of that name; write the path out")
    return Path(expanded)


def write_whole(path: Path, text: str) -> None:
    """The file on disk with all of the text, or as it was; never half of it under its name. Into a device or a pipe,
    whatever it takes."""
    path = Path(os.path.realpath(path))  # a link stays one
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:  # a Ctrl-C too
        beside.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """The file, or the names in the directory, are on disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_new(texts: Mapping[Path, str]) -> None:
    """Files that are not there yet, in this order, and their directories: all of the files, or none where one cannot be
    written."""
    begun: list[Path] = []
    try:
        for path, text in texts.items():
            if path.parent.exists() and not path.parent.is_dir():  # mkdir would say that it exists
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path.parent))
            path.parent.mkdir(parents=True, exist_ok=True)
            begun.append(path)
            write_whole(path, text)
    except BaseException:  # a Ctrl-C too
        for path in begun:
            with suppress(OSError):
                path.unlink()
        raise
