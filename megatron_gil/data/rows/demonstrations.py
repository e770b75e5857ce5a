"""Rows of one text each: demonstrations and plain text to imitate, responses to be scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_gil.data.rows.collate import pad_response_mask, pad_tokens
from megatron_gil.data.rows.dataset import ResponseRowDataset
from megatron_gil.data.rows.encoding import EncodedRow, Prompt, encode_conversation, encode_responses, prompt_text
from megatron_gil.data.rows.fields import Row
from megatron_gil.types import TokenBatch


class DemonstrationDataset(ResponseRowDataset[EncodedRow]):
    """Rows of {"prompt", "completion"} or {"messages"}; of messages, every assistant turn is imitated."""

    kind = "demonstrations"

    def collate(self, row_ids: Sequence[int]) -> TokenBatch:
        """The rows, in that order. An end-of-sequence token follows the last response, and counts as part of it."""
        rows = [self._encode(row_id) for row_id in row_ids]
        return collate_rows(rows, row_ids, self._tokenizer.pad_id)

    def text(self, row_id: int) -> tuple[str, str]:
        """The prompt as the model reads it, control tokens written out, and the (last) response, before any cut."""
        row = self._records[int(row_id)]
        if row["messages"] is not None:
            return prompt_text(self._tokenizer, row["messages"][:-1]).text, row["messages"][-1]["content"]
        return prompt_text(self._tokenizer, row["prompt"]).text, row["completion"]

    def _encode_row(self, row: Row) -> EncodedRow:
        if row["messages"] is not None:
            return encode_conversation(self._tokenizer, row["messages"], **self._limits)
        return encode_responses(self._tokenizer, row["prompt"], [row["completion"]], **self._limits)[0]

    def _measure(self, encoded: EncodedRow) -> tuple[int, bool]:
        return encoded.num_tokens, encoded.prompt_cut or encoded.response_cut


class ResponseDataset(DemonstrationDataset):
    """Rows of {"prompt", "response"}, as `generate` writes them; a response may be empty. Where the row has the
    prompt as messages too, the messages are read."""

    kind = "responses"

    def text(self, row_id: int) -> tuple[str, str]:
        row = self._records[int(row_id)]
        return prompt_text(self._tokenizer, _prompt_of(row)).text, row["completion"]

    def fields(self, row_id: int) -> dict[str, Any]:
        """The row under the names of data files."""
        row = self._records[int(row_id)]
        messages = {} if row["messages"] is None else {"messages": row["messages"]}
        return {"prompt": row["prompt"], **messages, "response": row["completion"]}

    def _encode_row(self, row: Row) -> EncodedRow:
        return encode_responses(self._tokenizer, _prompt_of(row), [row["completion"]], **self._limits)[0]


def _prompt_of(row: Row) -> Prompt:
    return row["prompt"] if row["messages"] is None else row["messages"]


class TextDataset(DemonstrationDataset):
    """Rows of {"text"}, of which every token is imitated, or demonstrations, of which the responses are."""

    kind = "texts"

    def text(self, row_id: int) -> tuple[str, str]:
        row = self._records[int(row_id)]
        return super().text(row_id) if row["text"] is None else ("", row["text"])

    def _encode_row(self, row: Row) -> EncodedRow:
        if row["text"] is None:
            return super()._encode_row(row)
        ids = [*self._tokenizer.encode(row["text"], bos=True), self._tokenizer.eos_id]
        kept = ids[: self._limits["max_tokens"]]
        return EncodedRow(
            tokens=kept,
            is_response=[True] * len(kept),
            num_tokens=len(ids),
            prompt_cut=False,
            response_cut=len(kept) < len(ids),
        )


def collate_rows(rows: Sequence[EncodedRow], row_ids: Sequence[int], pad_id: int) -> TokenBatch:
    tokens, lengths = pad_tokens([row.tokens for row in rows], pad_id)
    return TokenBatch(
        tokens=tokens,
        lengths=lengths,
        response_mask=pad_response_mask([row.is_response for row in rows], tokens.shape[1]),
        row_ids=torch.tensor(row_ids, dtype=torch.int64),
    )
