"""Prompts to answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_gil.data.collate import pad_tokens
from megatron_gil.data.encoding import Prompt, encode_prompt, prompt_text
from megatron_gil.data.records import read_records
from megatron_gil.data.tokenizer import Tokenizer
from megatron_gil.types import PromptBatch


class PromptDataset:
    """Rows of {"prompt"} or {"messages"}, tokenised as they are asked for."""

    def __init__(self, path: str | Path, tokenizer: Tokenizer, *, max_prompt_tokens: int) -> None:
        self._records = read_records(path, "prompts")
        self._tokenizer = tokenizer
        self._max_prompt_tokens = max_prompt_tokens
        self._cut_rows: set[int] = set()
        self.group_names, self._group_ids = number_groups(list(self._records["group"]))

    def __len__(self) -> int:
        return len(self._records)

    @property
    def num_truncated(self) -> int:
        """Prompts cut to fit, among those asked for so far."""
        return len(self._cut_rows)

    @property
    def num_labelled(self) -> int:
        """Rows that came with a group."""
        return int((self._group_ids >= 0).sum())

    def collate(self, row_ids: Sequence[int], sample_ids: Sequence[int], *, pad_to_multiple: int = 1) -> PromptBatch:
        """The prompts of the rows, in that order; a row may be asked for several times."""
        encoded = {row_id: self._encode(row_id) for row_id in dict.fromkeys(row_ids)}
        tokens, lengths = pad_tokens([encoded[i] for i in row_ids], self._tokenizer.pad_id, pad_to_multiple)
        rows = torch.tensor(row_ids, dtype=torch.int64)
        return PromptBatch(
            tokens=tokens,
            lengths=lengths,
            row_ids=rows,
            sample_ids=torch.tensor(sample_ids, dtype=torch.int64),
            known_groups=torch.from_numpy(self._group_ids)[rows],
        )

    def text(self, row_id: int) -> str:
        """The prompt as the model reads it, before any cut."""
        return prompt_text(self._tokenizer, self._prompt(row_id))

    def _prompt(self, row_id: int) -> Prompt:
        row = self._records[int(row_id)]
        return row["messages"] if row["prompt"] is None else row["prompt"]

    def _encode(self, row_id: int) -> list[int]:
        ids, cut = encode_prompt(self._tokenizer, self._prompt(row_id), self._max_prompt_tokens)
        if cut:
            self._cut_rows.add(row_id)
        return ids


def number_groups(labels: Sequence[str | None]) -> tuple[tuple[str, ...], np.ndarray]:
    """The distinct labels, sorted (as numbers where all are whole numbers), and the index of each row's, -1 without."""
    distinct = {label for label in labels if label is not None}
    numeric = all(label.removeprefix("-").isdecimal() for label in distinct)
    names = tuple(sorted(distinct, key=lambda label: (int(label) if numeric else 0, label)))
    number_of = {name: i for i, name in enumerate(names)}
    return names, np.array([-1 if label is None else number_of[label] for label in labels], dtype=np.int64)
