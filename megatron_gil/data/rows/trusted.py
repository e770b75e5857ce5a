"""Responses with a number that somebody trusts, against which a reward model is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_gil.config import ConfigError
from megatron_gil.data.rows.demonstrations import ResponseDataset
from megatron_gil.data.rows.fields import LARGEST, as_float
from megatron_gil.data.rows.records import iter_records
from megatron_gil.data.text.tokenizer import Tokenizer


class TrustedDataset(ResponseDataset):
    """Rows of {"prompt", "response", "trusted"}."""

    def __init__(self, path: str | Path, tokenizer: Tokenizer, **options: Any) -> None:
        """options: of a ResponseDataset."""
        super().__init__(path, tokenizer, **options)
        self.trusted: list[float] = [read_trusted(row, where) for where, row in iter_records(path, self.kind)]
        """Of each row, finite."""

    def fields(self, row_id: int) -> dict[str, Any]:
        return {**super().fields(row_id), "trusted": self.trusted[int(row_id)]}


def read_trusted(row: Any, where: str) -> float:
    """ConfigError begins with `where` (file:line)."""
    value = row.get("trusted")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{where}: field trusted must be a number that somebody trusts, such as a person's rating")
    number = as_float(value)
    if not abs(number) <= LARGEST:  # a NaN too
        raise ConfigError(f"{where}: field trusted is {number}, which is no number to compare with")
    return number
