"""Pairs of responses, one preferred to the other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch

from megatron_gil.data.rows.collate import pad_response_mask, pad_tokens
from megatron_gil.data.rows.dataset import ResponseRowDataset
from megatron_gil.data.rows.encoding import EncodedRow, encode_responses, prompt_text
from megatron_gil.data.rows.fields import Row
from megatron_gil.types import PreferenceBatch


class PreferenceDataset(ResponseRowDataset[list[EncodedRow]]):
    """Rows of {"prompt", "chosen", "rejected"}."""

    kind = "preferences"

    def collate(self, row_ids: Sequence[int]) -> PreferenceBatch:
        """The pairs, in that order; both responses follow the same prompt and end in an end-of-sequence token."""
        pairs = [self._encode(row_id) for row_id in row_ids]
        rows = list(chain.from_iterable(pairs))
        tokens, lengths = pad_tokens([row.tokens for row in rows], self._tokenizer.pad_id)
        mask = pad_response_mask([row.is_response for row in rows], tokens.shape[1])
        return PreferenceBatch(
            tokens=tokens.view(len(pairs), 2, -1),
            lengths=lengths.view(len(pairs), 2),
            response_mask=mask.view(len(pairs), 2, -1),
            row_ids=torch.tensor(row_ids, dtype=torch.int64),
            ref_log_probs=torch.zeros(len(pairs), 2),
        )

    def text(self, row_id: int) -> tuple[str, str, str]:
        """The prompt as the model reads it, the chosen and the rejected response, before any cut."""
        row = self._records[int(row_id)]
        return prompt_text(self._tokenizer, row["prompt"]).text, row["chosen"], row["rejected"]

    def fields(self, row_id: int) -> dict[str, str]:
        """The row under the names of data files."""
        row = self._records[int(row_id)]
        return {name: row[name] for name in ("prompt", "chosen", "rejected")}

    def _encode_row(self, row: Row) -> list[EncodedRow]:
        return encode_responses(self._tokenizer, row["prompt"], [row["chosen"], row["rejected"]], **self._limits)

    def _measure(self, encoded: list[EncodedRow]) -> tuple[int, bool]:
        return max(side.num_tokens for side in encoded), any(side.prompt_cut or side.response_cut for side in encoded)
