"""The files that generate, score, evaluate-reward and audit write."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityFiles:
    """What evaluate-reward writes."""

    numbers: Path
    table: Path
    picture: Path
    scored: Path
    """Of a model; it has an unfinished file beside it while it is written."""


def quality_files(
    value: str | Path, *, named: str = "output=", may_lack_directory: bool = False, scores: bool = True
) -> QualityFiles:
    """The names that follow from `output`; ConfigError where it is not called .json, has no directory, or where one of
    the files exists.

    named: how the user gives `output`. scores: whether the scored pairs are written too.
    """
    path = Path(value)
    if path.suffix != ".json":
        raise ConfigError(f"{named}{path} must end in .json: it holds the numbers; table and picture lie beside it")
    files = QualityFiles(
        numbers=path,
        table=path.with_suffix(".md"),
        picture=path.with_suffix(".svg"),
        scored=path.with_suffix(".scored.jsonl"),
    )
    for file in (files.numbers, files.table, files.picture):
        if file.exists():
            raise ConfigError(f"{named}{path}: {file} exists already; nothing is overwritten, choose another name")
    if scores and files.scored.exists():
        raise ConfigError(
            f"{named}{path}: {files.scored} exists already; `megatron-gil evaluate-reward {files.scored}` evaluates "
            "it, or choose another name"
        )
    if not (may_lack_directory or path.parent.is_dir()):
        raise ConfigError(f"{named}{path}: the directory {path.parent} does not exist")
    return files


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditFiles:
    """What audit writes."""

    numbers: Path
    page: Path


def audit_files(value: str, *, may_lack_directory: bool = False) -> AuditFiles:
    """The names that follow from `output`; ConfigError where it is not called .json, has no directory, or where one of
    the files exists."""
    path = Path(value)
    if path.suffix != ".json":
        raise ConfigError(f"output={path} must end in .json: it holds the numbers; the page lies beside it")
    files = AuditFiles(numbers=path, page=path.with_suffix(".html"))
    for file in (files.numbers, files.page):
        if file.exists():
            raise ConfigError(f"output={path}: {file} exists already; nothing is overwritten, choose another name")
    if not (may_lack_directory or path.parent.is_dir()):
        raise ConfigError(f"output={path}: the directory {path.parent} does not exist")
    return files
