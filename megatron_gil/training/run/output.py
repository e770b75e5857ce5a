"""The file that generate and score write."""

from __future__ import annotations

from pathlib import Path

from megatron_gil.config import ConfigError


def new_file(value: str, *, may_lack_directory: bool = False) -> Path:
    """The path of `output`; ConfigError for one that exists, has no directory or is not called .jsonl.

    may_lack_directory: an earlier stage will make it.
    """
    path = Path(value)
    if path.suffix != ".jsonl":
        raise ConfigError(f"output={path} must end in .jsonl: that is what it holds, and what score reads")
    if path.exists():
        raise ConfigError(f"output={path} exists already; nothing is overwritten, choose another name")
    if not (may_lack_directory or path.parent.is_dir()):
        raise ConfigError(f"output={path}: the directory {path.parent} does not exist")
    return path
