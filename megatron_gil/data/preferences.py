"""Pairs of replies, one preferred to the other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch

from megatron_gil.data.collate import pad_response_mask, pad_tokens
from megatron_gil.data.demonstrations import check_lengths
from megatron_gil.data.encoding import EncodedRow, encode_replies, prompt_text
from megatron_gil.data.prompts import number_groups
from megatron_gil.data.records import read_records
from megatron_gil.data.tokenizer import Tokenizer
from megatron_gil.types import PreferenceBatch


class PreferenceDataset:
    """Rows of {"prompt", "chosen", "rejected"}, tokenised as they are asked for."""

    def __init__(self, path: str | Path, tokenizer: Tokenizer, *, max_tokens: int, max_prompt_tokens: int) -> None:
        check_lengths(max_tokens, max_prompt_tokens)
        self._records = read_records(path, "preferences")
        self._tokenizer = tokenizer
        self._limits = {"max_tokens": max_tokens, "max_prompt_tokens": max_prompt_tokens}
        self._cut_rows: set[int] = set()
        self.group_names, self._group_ids = number_groups(list(self._records["group"]))

    def __len__(self) -> int:
        return len(self._records)

    @property
    def num_truncated(self) -> int:
        """Pairs of which the prompt or a reply was cut to fit, among those asked for so far."""
        return len(self._cut_rows)

    def collate(self, row_ids: Sequence[int], *, pad_to_multiple: int = 1) -> PreferenceBatch:
        """The pairs, in that order; both replies follow the same prompt and end in an end-of-sequence token."""
        pairs = [self._encode(row_id) for row_id in row_ids]
        rows = list(chain.from_iterable(pairs))
        tokens, lengths = pad_tokens([row.tokens for row in rows], self._tokenizer.pad_id, pad_to_multiple)
        mask = pad_response_mask([row.is_reply for row in rows], tokens.shape[1])
        return PreferenceBatch(
            tokens=tokens.view(len(pairs), 2, -1),
            lengths=lengths.view(len(pairs), 2),
            response_mask=mask.view(len(pairs), 2, -1),
            row_ids=torch.tensor(row_ids, dtype=torch.int64),
            ref_log_probs=torch.zeros(len(pairs), 2),
        )

    def known_groups(self, row_ids: Sequence[int]) -> list[int]:
        """Index into `group_names` of each row's label, -1 without one."""
        return self._group_ids[list(row_ids)].tolist()

    def text(self, row_id: int) -> tuple[str, str, str]:
        """The prompt as the model reads it, the chosen and the rejected reply, before any cut."""
        row = self._records[int(row_id)]
        return prompt_text(self._tokenizer, row["prompt"]), row["chosen"], row["rejected"]

    def _encode(self, row_id: int) -> list[EncodedRow]:
        row = self._records[int(row_id)]
        pair = encode_replies(self._tokenizer, row["prompt"], [row["chosen"], row["rejected"]], **self._limits)
        if any(side.prompt_cut or side.reply_cut for side in pair):
            self._cut_rows.add(row_id)
        return pair
