"""Training files: JSON Lines or Parquet, checked row by row (fields.py), then memory-mapped by `datasets`."""

from __future__ import annotations

import gzip
import hashlib
import json
import weakref
import zlib
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_gil.config import ConfigError
from megatron_gil.data.checked_copies import cannot_copy, take_copy
from megatron_gil.data.fields import COLUMNS, LONGEST_ROW, Row, check_record

if TYPE_CHECKING:
    from datasets import Dataset

_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_CACHE_VERSION = "1"  # to be raised with every change of what `check_record` accepts or returns


def read_records(path: str | Path, kind: str) -> Dataset:
    """All rows of a file, or of a directory's files in the order of their names, as a memory map.

    A directory written by tools/prepare_data.py is read for the file of its kind alone. Every row is checked before
    this returns (once: the checked copy is shared, see checked_copies.py, and known by path, size and time of change).
    ConfigError names file, line and field.
    """
    files = _find_files(Path(path), kind)
    stamps = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = hashlib.sha256(repr((_CACHE_VERSION, kind, stamps)).encode()).hexdigest()[:32]
    return _memory_map([str(f) for f in files], kind, key)


def _memory_map(files: list[str], kind: str, key: str) -> Dataset:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    text = datasets.Value("string")
    features = datasets.Features({**dict.fromkeys(COLUMNS, text), "messages": [{"role": text, "content": text}]})
    quiet = datasets.are_progress_bars_disabled()
    directory, release = take_copy(key)
    datasets.disable_progress_bars()
    try:
        mapped = datasets.Dataset.from_generator(
            _iter_files,
            gen_kwargs={"files": files, "kind": kind},
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


def iter_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of every line that is not blank. ConfigError for a line that is not UTF-8 or not JSON."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(iter(partial(file.readline, LONGEST_ROW + 1), b""), start=1):
                if len(line) > LONGEST_ROW:
                    raise ConfigError(
                        f"{path}:{number}: a row of more than {LONGEST_ROW >> 20} MiB; cut it into several"
                    )
                if line.strip():
                    yield number, _parse_line(line, f"{path}:{number}")
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def _parse_line(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not UTF-8 at byte {error.start + 1} of the line") from None
    except RecursionError:
        raise ConfigError(f"{where}: JSON nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ConfigError(f"{where}: not valid JSON: {error}") from None


def _iter_files(files: list[str], kind: str) -> Iterator[Row]:
    num_rows = 0
    for name in files:
        iterate = iter_parquet if name.endswith(".parquet") else iter_jsonl
        for number, record in iterate(Path(name)):
            yield check_record(record, kind, f"{name}:{number}")
            num_rows += 1
    if num_rows == 0:
        raise ConfigError(f"{', '.join(files)}: no rows")


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
        own = sorted(f for f in path.iterdir() if f.name.split(".")[0] == kind and f.name.endswith(_SUFFIXES))
        files = own or sorted(f for f in path.iterdir() if f.is_file() and f.name.endswith(_SUFFIXES))
        if not files:
            raise ConfigError(f"{path}: holds no file that ends in {', '.join(_SUFFIXES)}")
        return files
    if not path.is_file():
        raise ConfigError(f"{path}: no such file or directory")
    if not path.name.endswith(_SUFFIXES):
        raise ConfigError(f"{path}: must end in {', '.join(_SUFFIXES)}; tools/prepare_data.py reads other forms")
    return [path]


def _config_error_in(error: BaseException, files: list[str], directory: Path) -> BaseException:
    """The ConfigError that `datasets` wrapped, one for the file system's that it met, or the error itself."""
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
