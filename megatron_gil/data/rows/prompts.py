"""Prompts to answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_gil.data.rows.collate import pad_tokens
from megatron_gil.data.rows.dataset import RowDataset
from megatron_gil.data.rows.encoding import EncodedPrompt, Prompt, encode_prompt, prompt_text
from megatron_gil.data.rows.fields import Row
from megatron_gil.data.text.chat import format_dialogue
from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.types import PromptBatch


class PromptDataset(RowDataset[EncodedPrompt]):
    """Rows of {"prompt"} or {"messages"}."""

    kind = "prompts"

    def __init__(
        self, path: str | Path, tokenizer: Tokenizer | None, *, max_prompt_tokens: int, others: bool = False
    ) -> None:
        super().__init__(path, tokenizer, {"max_prompt_tokens": max_prompt_tokens}, others=others)

    @property
    def num_labelled(self) -> int:
        """Rows that came with a group."""
        return int((self._group_ids >= 0).sum())

    def collate(self, row_ids: Sequence[int], sample_ids: Sequence[int]) -> PromptBatch:
        """The prompts of the rows, in that order; a row may be asked for several times."""
        encoded = {row_id: self._encode(row_id).tokens for row_id in dict.fromkeys(row_ids)}
        tokens, lengths = pad_tokens([encoded[i] for i in row_ids], self._tokenizer.pad_id)
        rows = torch.tensor(row_ids, dtype=torch.int64)
        return PromptBatch(
            tokens=tokens,
            lengths=lengths,
            row_ids=rows,
            sample_ids=torch.tensor(sample_ids, dtype=torch.int64),
            known_groups=torch.from_numpy(self._group_ids)[rows],
        )

    def text(self, row_id: int) -> str:
        """The prompt as the model would read it without any cut, control tokens written out."""
        return prompt_text(self._tokenizer, _prompt_of(self._records[int(row_id)])).text

    def read_prompt(self, row_id: int) -> Prompt:
        """What the model reads of the prompt, in the form that the row has."""
        return self._encode(row_id).read

    def fields(self, row_id: int) -> dict[str, Any]:
        """The prompt under the names of data files: as text, and as messages where it came as such."""
        prompt = _prompt_of(self._records[int(row_id)])
        if isinstance(prompt, str):
            return {"prompt": prompt}
        return {"prompt": format_dialogue(prompt), "messages": prompt}

    def _encode_row(self, row: Row) -> EncodedPrompt:
        return encode_prompt(self._tokenizer, _prompt_of(row), self._limits["max_prompt_tokens"])

    def _measure(self, encoded: EncodedPrompt) -> tuple[int, bool]:
        return encoded.num_tokens, encoded.cut


class PreferencePrompts(PromptDataset):
    """The prompts of preference pairs, a row for each pair."""

    kind = "preferences"


class ResponsePrompts(PromptDataset):
    """The prompts of responses, a row for each response."""

    kind = "responses"


def _prompt_of(row: Row) -> Prompt:
    return row["messages"] if row["prompt"] is None else row["prompt"]
