"""Rollouts as text that a person can read."""

from __future__ import annotations

from megatron_gil.data.tokenizer import Tokenizer
from megatron_gil.types import Rollout


def sample_texts(rollout: Rollout, tokenizer: Tokenizer, count: int | None = None) -> list[dict[str, str]]:
    """{"prompt", "response"} of the first `count` rows (all, if None), as the model read and wrote them."""
    texts = []
    rows = zip(rollout.tokens.tolist(), rollout.prompt_lengths.tolist(), rollout.lengths.tolist(), strict=True)
    for tokens, prompt_length, length in list(rows)[:count]:
        prompt, response = tokens[:prompt_length], tokens[prompt_length:length]
        texts.append({"prompt": tokenizer.decode(prompt), "response": tokenizer.decode(response, after=prompt)})
    return texts
