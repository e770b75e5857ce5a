"""A rollout as text for a reward model that has a tokenizer of its own (models.reward_tokenizer=own)."""

from __future__ import annotations

from megatron_gil.data.rows.demonstrations import collate_rows
from megatron_gil.data.rows.encoding import EncodedRow, Prompt, encode_prompt, encode_response
from megatron_gil.data.rows.prompts import PromptDataset
from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.types import Rollout, TokenBatch


class RewardText:
    """Prompts and responses in the reward model's tokens, as `score` makes them of the same texts: its own bos, its own
    chat template, its own end-of-sequence token after the response."""

    def __init__(self, policy_tokenizer: Tokenizer, own: Tokenizer, *, max_tokens: int) -> None:
        """max_tokens: positions of the reward model. A longer text loses the oldest of its prompt."""
        self._policy_tokenizer, self._own, self._max_tokens = policy_tokenizer, own, max_tokens

    def rows(self, rollout: Rollout, prompts: PromptDataset) -> tuple[TokenBatch, list[bool]]:
        """(the rows, whether each was cut to fit). prompts: the data set that the rollout's row ids speak of."""
        row_ids = rollout.row_ids.tolist()
        read = {row_id: prompts.read_prompt(row_id) for row_id in dict.fromkeys(row_ids)}
        lengths = zip(rollout.prompt_lengths.tolist(), rollout.lengths.tolist(), strict=True)
        rows = []
        for row_id, tokens, (prompt_length, length) in zip(row_ids, rollout.tokens.tolist(), lengths, strict=True):
            response = self._policy_tokenizer.decode(tokens[prompt_length:length], after=tokens[:prompt_length])
            rows.append(self.encode(read[row_id], response))
        batch = collate_rows(rows, row_ids, self._own.pad_id)
        device = rollout.tokens.device
        moved = TokenBatch(
            tokens=batch.tokens.to(device),
            lengths=batch.lengths.to(device),
            response_mask=batch.response_mask.to(device),
            row_ids=rollout.row_ids,
        )
        return moved, [row.prompt_cut or row.response_cut for row in rows]

    def encode(self, prompt: Prompt, response: str) -> EncodedRow:
        own = encode_response(self._own, prompt, response)
        encoded = encode_prompt(self._own, prompt, max(1, self._max_tokens - len(own)))
        tokens = [*encoded.tokens, *own]
        kept = tokens[: self._max_tokens]
        return EncodedRow(
            tokens=kept,
            is_response=[i >= len(encoded.tokens) for i in range(len(kept))],
            num_tokens=encoded.num_tokens + len(own),
            prompt_cut=encoded.cut,
            response_cut=len(kept) < len(tokens),
        )
