"""Native rows from local files, from directories of files, and from the hub."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gil.config import ConfigError
from megatron_gil.data.rows.records import iter_parquet
from megatron_gil.jsonl import iter_jsonl

_SUFFIXES = (".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz", ".parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubChoice:
    """Which part of a data set on the hub."""

    split: str = "train"
    config: str | None = None
    data_dir: str | None = None


def iter_native_rows(name: str, hub: HubChoice) -> Iterator[tuple[str, Any]]:
    """(where it comes from, row) of a file, of every file below a directory in the order of their paths, or of a data
    set on the hub."""
    path = Path(name)
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.name.endswith(_SUFFIXES) and f.is_file())
        if not files:
            raise ConfigError(f"{path}: holds no file that ends in {', '.join(_SUFFIXES)}")
        for file in files:
            yield from ((str(file), row) for row in _iter_file(file))
    elif path.is_file():
        yield from ((name, row) for row in _iter_file(path))
    elif path.is_absolute() or name.startswith(".") or name.count("/") > 1 or name.endswith(_SUFFIXES):
        raise ConfigError(f"{path}: no such file or directory")
    else:
        yield from ((f"{name}/{hub.data_dir or ''}", row) for row in stream_hub(name, hub))


def stream_hub(name: str, hub: HubChoice) -> Iterator[Mapping[str, Any]]:
    """Rows of a data set by its name on the hub (or of a directory that `datasets` can load); rows are read one
    after the other: few are in memory at a time, and none is kept on disk."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        yield from datasets.load_dataset(name, hub.config, data_dir=hub.data_dir, split=hub.split, streaming=True)
    except (OSError, ValueError, DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{name}: no such file here, and not readable as {hub} of the hub: {reason}") from None


def _iter_file(path: Path) -> Iterator[Any]:
    if not path.name.endswith(_SUFFIXES):
        raise ConfigError(f"{path}: must end in {', '.join(_SUFFIXES)}")
    stem = path.name.removesuffix(".gz")
    if stem.endswith(".csv"):
        yield from _iter_csv(path)
    elif stem.endswith(".json"):
        yield from _iter_json(path)
    else:
        numbered = iter_parquet(path) if stem.endswith(".parquet") else iter_jsonl(path)
        yield from (row for _, row in numbered)


def _iter_json(path: Path) -> Iterator[Any]:
    """Rows of a .json file: a list of rows, an object with such a list under "data", a single row, or JSON Lines,
    which are often named so."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            value = json.loads(file.read().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            where = f"line {error.lineno}, column {error.colno}"
            raise ConfigError(f"{path}: not valid JSON: {error.msg} at {where}") from None
        yield from (row for _, row in iter_jsonl(path))
        return
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if isinstance(value, Mapping) and isinstance(value.get("data"), list):
        value = value["data"]
    yield from value if isinstance(value, list) else [value]


def _iter_csv(path: Path) -> Iterator[Mapping[str, str]]:
    # pandas, because the csv module has a global limit on the length of a field
    import pandas

    try:
        for chunk in pandas.read_csv(path, dtype=str, keep_default_na=False, chunksize=1000, encoding="utf-8-sig"):
            yield from chunk.to_dict("records")
    except (OSError, EOFError, zlib.error, ValueError) as error:  # ParserError and bad UTF-8 are ValueErrors
        raise ConfigError(f"{path}: cannot be read as CSV: {' '.join(str(error).split())}") from None
