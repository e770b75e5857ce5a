"""What all data sets have in common."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from megatron_gil.config import ConfigError
from megatron_gil.data.rows.fields import OTHERS, OURS, Row, iter_texts
from megatron_gil.data.rows.records import read_records
from megatron_gil.data.text.tokenizer import Tokenizer

Encoded = TypeVar("Encoded")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """How the rows of a data set fit."""

    limits: str
    """What the rows were cut to, in words."""
    num_rows: int
    num_measured: int
    """How many rows were measured: all, or this many at even distances."""
    num_cut: int
    """Measured rows that lost tokens of the prompt or of a response."""
    longest: int
    """Tokens of the longest measured row, before any cut."""
    num_with_control_text: int
    """Measured rows in whose text control tokens are written; these are read as text."""

    def __str__(self) -> str:
        among = "" if self.num_measured == self.num_rows else f" of {self.num_measured:,} measured"
        share = f" ({self.num_cut / self.num_measured:.1%})" if self.num_cut else ""
        num_cut = f"{self.num_cut:,}" if self.num_cut else "none"
        found = f"{self.num_rows:,} rows, {num_cut}{among}{share} cut to {self.limits}"
        found += f"; the longest has {self.longest:,} tokens"
        if self.num_with_control_text:
            found += f"; in {self.num_with_control_text:,}{among} control tokens are written, which are read as text"
        return found


class RowDataset(ABC, Generic[Encoded]):
    """The rows of a file. All are checked when it is opened; each is tokenised when it is asked for."""

    kind: ClassVar[str]

    def __init__(
        self, path: str | Path, tokenizer: Tokenizer | None, limits: dict[str, int], *, others: bool = False
    ) -> None:
        """tokenizer: None where only the texts are asked for. limits: name of a key of the section data, such as
        max_tokens -> its value. others: keep the fields of the rows that are not read here."""
        self.path, self._limits, self._has_others = str(path), limits, others
        self._records = read_records(path, self.kind, others=others)
        self._given_tokenizer = tokenizer
        self._cut_rows: set[int] = set()
        self.group_names, self._group_ids = number_groups(list(self._records["group"]))

    def __len__(self) -> int:
        return len(self._records)

    @property
    def _tokenizer(self) -> Tokenizer:
        assert self._given_tokenizer is not None, "only the texts were asked for"
        return self._given_tokenizer

    def known_groups(self, row_ids: Sequence[int]) -> list[int]:
        """Index into `group_names` of each row's label, -1 without one."""
        return self._group_ids[list(row_ids)].tolist()

    def others(self, row_id: int) -> dict[str, Any]:
        """The fields of a row but its prompt and its responses, as the file has them."""
        return json.loads(self._records[int(row_id)][OTHERS]) if self._has_others else {}

    @cached_property
    def other_names(self) -> tuple[str, ...]:
        """The names of these fields in all rows, sorted."""
        rows = self._iter_rows(range(len(self))) if self._has_others else ()
        return tuple(sorted({name for row in rows for name in json.loads(row[OTHERS])}))

    def passed_on(self, row_id: int) -> dict[str, Any]:
        """Those that mean nothing in the files that we write, and are written on."""
        return {name: value for name, value in self.others(row_id).items() if name not in OURS}

    def truncated(self, row_ids: Sequence[int]) -> list[bool]:
        """Which of these rows, all asked for before, were cut to fit."""
        return [row_id in self._cut_rows for row_id in row_ids]

    def describe(self) -> str:
        """How many rows there are and, where they are read as tokens, how they fit."""
        return f"{len(self):,} rows" if self._given_tokenizer is None else str(self.measure())

    def measure(self, max_rows: int = 5_000) -> Lengths:
        """Encode every row, or `max_rows` of them at even distances where there are more."""
        num_rows = len(self)
        count = min(num_rows, max_rows)
        any_token = "|".join(map(re.escape, self._tokenizer.control_tokens)) or r"(?!)"
        control_text, num_cut, longest, num_with_control_text = re.compile(any_token), 0, 0, 0
        for row in self._iter_rows([i * num_rows // count for i in range(count)]):
            num_tokens, cut = self._measure(self._encode_row(row))
            num_cut, longest = num_cut + cut, max(longest, num_tokens)
            num_with_control_text += any(map(control_text.search, iter_texts(row)))
        return Lengths(
            limits=", ".join(f"data.{key}={value}" for key, value in self._limits.items()),
            num_rows=num_rows,
            num_measured=count,
            num_cut=num_cut,
            longest=longest,
            num_with_control_text=num_with_control_text,
        )

    @abstractmethod
    def _encode_row(self, row: Row) -> Encoded:
        """A row of read_records as tokens."""

    @abstractmethod
    def _measure(self, encoded: Encoded) -> tuple[int, bool]:
        """(tokens before any cut, whether it was cut)."""

    def _encode(self, row_id: int) -> Encoded:
        encoded = self._encode_row(self._records[int(row_id)])
        if self._measure(encoded)[1]:
            self._cut_rows.add(row_id)
        return encoded

    def _iter_rows(self, row_ids: Sequence[int]) -> Iterator[Row]:
        for start in range(0, len(row_ids), 1000):  # in pieces: one row at a time takes ten times as long
            columns = self._records[row_ids[start : start + 1000]]
            yield from (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))


class ResponseRowDataset(RowDataset[Encoded]):
    """Rows that hold their responses, which data.max_tokens leaves room for."""

    def __init__(
        self,
        path: str | Path,
        tokenizer: Tokenizer | None,
        *,
        max_tokens: int,
        max_prompt_tokens: int,
        others: bool = False,
    ) -> None:
        if max_prompt_tokens >= max_tokens:
            raise ConfigError(
                f"data.max_prompt_tokens={max_prompt_tokens} leaves no room for a response in data.max_tokens="
                f"{max_tokens}; lower the first or raise the second"
            )
        limits = {"max_tokens": max_tokens, "max_prompt_tokens": max_prompt_tokens}
        super().__init__(path, tokenizer, limits, others=others)


def number_groups(labels: Sequence[str | None]) -> tuple[tuple[str, ...], np.ndarray]:
    """The distinct labels, sorted (as numbers where all are whole numbers), and the index of each row's, -1 without."""
    distinct = {label for label in labels if label is not None}
    numeric = all(label.removeprefix("-").isdecimal() for label in distinct)
    names = tuple(sorted(distinct, key=lambda label: (int(label) if numeric else 0, label)))
    number_of = {name: i for i, name in enumerate(names)}
    return names, np.array([-1 if label is None else number_of[label] for label in labels], dtype=np.int64)
