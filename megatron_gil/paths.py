"""Paths that a user gives."""

from __future__ import annotations

import os
from pathlib import Path


def expand_user(path: str | Path) -> Path:
    """The path with a leading ~ or ~USER replaced, which a shell does only where a word begins with it.

    ValueError where there is no such user.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"{path}: there is no home directory of that name; write the path out")
    return Path(expanded)
