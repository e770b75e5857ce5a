"""Rows to imitate: demonstrations, model responses to be scored, plain text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_gil.config import ConfigError
from megatron_gil.data.collate import pad_response_mask, pad_tokens
from megatron_gil.data.encoding import EncodedRow, encode_conversation, encode_replies, prompt_text
from megatron_gil.data.prompts import number_groups
from megatron_gil.data.records import read_records
from megatron_gil.data.tokenizer import Tokenizer
from megatron_gil.types import TokenBatch


class DemonstrationDataset:
    """Rows of {"prompt", "completion"} or {"messages"}; of messages, every assistant turn is imitated."""

    kind = "demonstrations"

    def __init__(self, path: str | Path, tokenizer: Tokenizer, *, max_tokens: int, max_prompt_tokens: int) -> None:
        check_lengths(max_tokens, max_prompt_tokens)
        self._records = read_records(path, self.kind)
        self._tokenizer = tokenizer
        self._limits = {"max_tokens": max_tokens, "max_prompt_tokens": max_prompt_tokens}
        self._cut_prompts: set[int] = set()
        self._cut_replies: set[int] = set()
        self.group_names, self._group_ids = number_groups(list(self._records["group"]))

    def __len__(self) -> int:
        return len(self._records)

    @property
    def num_truncated(self) -> int:
        """Rows cut to fit, at either end, among those asked for so far."""
        return len(self._cut_prompts | self._cut_replies)

    @property
    def num_truncated_replies(self) -> int:
        """Rows whose reply lost its end, among those asked for so far."""
        return len(self._cut_replies)

    def collate(self, row_ids: Sequence[int], *, pad_to_multiple: int = 1) -> TokenBatch:
        """The rows, in that order. An end-of-sequence token follows the last reply, and counts as part of it."""
        rows = [self._encode(row_id) for row_id in row_ids]
        tokens, lengths = pad_tokens([row.tokens for row in rows], self._tokenizer.pad_id, pad_to_multiple)
        return TokenBatch(
            tokens=tokens,
            lengths=lengths,
            response_mask=pad_response_mask([row.is_reply for row in rows], tokens.shape[1]),
            row_ids=torch.tensor(row_ids, dtype=torch.int64),
        )

    def known_groups(self, row_ids: Sequence[int]) -> list[int]:
        """Index into `group_names` of each row's label, -1 without one."""
        return self._group_ids[list(row_ids)].tolist()

    def text(self, row_id: int) -> tuple[str, str]:
        """The prompt as the model reads it and the (last) reply, before any cut."""
        row = self._records[int(row_id)]
        if row["messages"] is not None:
            return prompt_text(self._tokenizer, row["messages"][:-1]), row["messages"][-1]["content"]
        return prompt_text(self._tokenizer, row["prompt"]), row["completion"]

    def _encode(self, row_id: int) -> EncodedRow:
        encoded = self._encode_record(self._records[int(row_id)])
        if encoded.prompt_cut:
            self._cut_prompts.add(row_id)
        if encoded.reply_cut:
            self._cut_replies.add(row_id)
        return encoded

    def _encode_record(self, row: dict[str, Any]) -> EncodedRow:
        if row["messages"] is not None:
            return encode_conversation(self._tokenizer, row["messages"], **self._limits)
        return encode_replies(self._tokenizer, row["prompt"], [row["completion"]], **self._limits)[0]


class ResponseDataset(DemonstrationDataset):
    """Rows of {"prompt", "response"}, as `generate` writes them; a response may be empty."""

    kind = "responses"


class TextDataset(DemonstrationDataset):
    """Rows of {"text"}, of which every token is imitated, or demonstrations, of which the replies are."""

    kind = "texts"

    def text(self, row_id: int) -> tuple[str, str]:
        row = self._records[int(row_id)]
        return super().text(row_id) if row["text"] is None else ("", row["text"])

    def _encode_record(self, row: dict[str, Any]) -> EncodedRow:
        if row["text"] is None:
            return super()._encode_record(row)
        ids = [*self._tokenizer.encode(row["text"], bos=True), self._tokenizer.eos_id]
        kept = ids[: self._limits["max_tokens"]]
        return EncodedRow(tokens=kept, is_reply=[True] * len(kept), prompt_cut=False, reply_cut=len(kept) < len(ids))


def check_lengths(max_tokens: int, max_prompt_tokens: int) -> None:
    if max_prompt_tokens >= max_tokens:
        raise ConfigError(
            f"data.max_prompt_tokens={max_prompt_tokens} leaves no room for a reply in data.max_tokens={max_tokens}; "
            "lower the first or raise the second"
        )
