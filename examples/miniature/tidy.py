"""Tidy data: one row per fact, as compressed CSV, which pandas and R read as it is; `zcat FILE | head` shows it."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_gil.evaluation.report.runs import Json


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Json]) -> None:
    """Floats with six digits. The same rows make the same bytes, since no time is written."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, header, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    path.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))
