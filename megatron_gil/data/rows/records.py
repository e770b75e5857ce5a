"""Training files: JSON Lines or Parquet, checked row by row (fields.py), then memory-mapped by `datasets`."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_gil.config import ConfigError
from megatron_gil.data.hub import DATA_SUFFIXES
from megatron_gil.data.rows.checked_copies import cannot_copy, take_copy
from megatron_gil.data.rows.fields import COLUMNS, OTHERS, Row, check_record, other_fields, scored_kind
from megatron_gil.jsonl import iter_jsonl

if TYPE_CHECKING:
    from datasets import Dataset

_CACHE_VERSION = "2"  # to be raised with every change of what `check_record` accepts or returns


def read_records(path: str | Path, kind: str, *, others: bool = False) -> Dataset:
    """All rows of a file, or of the files of a directory or a pattern in the order of their names, as a memory map.

    A directory written by tools/prepare_data.py is read for the file of its kind alone. Every row is checked before
    this returns. A file is checked once: its checked copy is known by path, size and time of change, and shared
    (checked_copies.py). others: with a column OTHERS of the fields that are none of COLUMNS' business. ConfigError
    names file, line and field."""
    files = _find_files(Path(path), kind)
    stamps = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    what = (_CACHE_VERSION, kind, stamps, *([OTHERS] if others else []))
    key = hashlib.sha256(repr(what).encode()).hexdigest()[:32]
    return _memory_map([str(f) for f in files], kind, key, others)


def iter_records(path: str | Path, kind: str) -> Iterator[tuple[str, Any]]:
    """(file:line, the row as the file has it) of every row, in the order of `read_records`."""
    for file in _find_files(Path(path), kind):
        yield from ((f"{file}:{number}", record) for number, record in _iterate(file))


def read_scored_kind(path: str | Path) -> str:
    """Whether a file or directory that is to be scored holds responses or preferences: a directory says it by the
    names of its files, else the first row by its fields."""
    files = _find_files(Path(path), "responses")
    if Path(path).is_dir() and not _is_of(files[0], "responses"):
        files = _find_files(Path(path), "preferences")
    for file in files:
        for _, record in _iterate(file):
            return scored_kind(record)
    return "responses"


def _memory_map(files: list[str], kind: str, key: str, others: bool) -> Dataset:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    text = datasets.Value("string")
    columns = {**dict.fromkeys(COLUMNS, text), "messages": [{"role": text, "content": text}]}
    features = datasets.Features({**columns, **({OTHERS: text} if others else {})})
    quiet = datasets.are_progress_bars_disabled()
    directory, release = take_copy(key)
    datasets.disable_progress_bars()
    try:
        mapped = datasets.Dataset.from_generator(
            _iter_files,
            gen_kwargs={"files": files, "kind": kind, "others": others},
            features=features,
            fingerprint=key,
            cache_dir=str(directory),
        )
        weakref.finalize(mapped, release)
    except (DatasetGenerationError, OSError) as error:
        release()
        raise _config_error_in(error, files, directory) from None
    finally:
        if not quiet:
            datasets.enable_progress_bars()
    assert isinstance(mapped, datasets.Dataset)
    return mapped


def _iter_files(files: list[str], kind: str, others: bool) -> Iterator[Row]:
    num_rows = 0
    for name in files:
        for number, record in _iterate(Path(name)):
            where = f"{name}:{number}"
            row = check_record(record, kind, where)
            yield {**row, OTHERS: other_fields(record, kind, where)} if others else row
            num_rows += 1
    if num_rows == 0:
        raise ConfigError(f"{', '.join(files)}: no rows")


def _iterate(file: Path) -> Iterator[tuple[int, Any]]:
    return iter_parquet(file) if file.name.endswith(".parquet") else iter_jsonl(file)


def iter_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    """(row number from 1, row) of every row."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        batches = ParquetFile(path).iter_batches(batch_size=1000)
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        yield from enumerate(rows, start=1)
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{path}: cannot be read as Parquet: {' '.join(str(error).split())}") from None


def _find_files(path: Path, kind: str) -> list[Path]:
    if path.is_dir():
        own = sorted(f for f in path.iterdir() if _is_of(f, kind) and f.name.endswith(DATA_SUFFIXES))
        files = own or sorted(f for f in path.iterdir() if f.is_file() and f.name.endswith(DATA_SUFFIXES))
        if not files:
            raise ConfigError(f"{path}: holds no file that ends in {', '.join(DATA_SUFFIXES)}")
        return files
    files = matching(path)
    if not files:
        raise ConfigError(f"{path}: no such file or directory")
    for file in files:
        if not file.name.endswith(DATA_SUFFIXES):
            forms = f"must end in {', '.join(DATA_SUFFIXES)}; `megatron-gil prepare-data` reads other forms"
            raise ConfigError(f"{file}: {forms}")
    return files


def matching(path: Path) -> list[Path]:
    """The file, or those whose names fit the pattern in its place, as part-*.parquet."""
    if path.is_file() or not path.parent.is_dir():
        return [path] if path.is_file() else []
    return sorted(file for file in path.parent.iterdir() if fnmatchcase(file.name, path.name) and file.is_file())


def _is_of(file: Path, kind: str) -> bool:
    return file.name.split(".")[0] == kind


def _config_error_in(error: BaseException, files: list[str], directory: Path) -> BaseException:
    """What to raise for an error of `datasets`: the ConfigError that it wraps, a ConfigError for a file-system error
    that it wraps, or the error itself."""
    causes, cause = list[BaseException](), error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    for cause in causes:
        if isinstance(cause, ConfigError):
            return cause
    for cause in causes:
        if isinstance(cause, OSError):
            return cannot_copy(files, directory, cause)
    return error
