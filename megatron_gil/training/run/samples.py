"""Rollouts and rows of training as text that a person can read."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.types import PreferenceBatch, Rollout, TokenBatch


def sample_texts(rollout: Rollout, tokenizer: Tokenizer, count: int | None = None) -> list[dict[str, str]]:
    """{"prompt", "response"} of the first `count` rows (all, if None), as the model read and wrote them."""
    texts = []
    rows = zip(rollout.tokens.tolist(), rollout.prompt_lengths.tolist(), rollout.lengths.tolist(), strict=True)
    for tokens, prompt_length, length in list(rows)[:count]:
        prompt, response = tokens[:prompt_length], tokens[prompt_length:length]
        texts.append({"prompt": tokenizer.decode(prompt), "response": tokenizer.decode(response, after=prompt)})
    return texts


def row_samples(
    batch: TokenBatch | PreferenceBatch, values: Tensor, names: tuple[str, ...], tokenizer: Tokenizer, count: int
) -> list[dict[str, Any]]:
    """{"prompt", "target"} or {"prompt", "chosen", "rejected"} of the first `count` rows, as the model read them, with
    the numbers `values` [B, names]; of two numbers, the chosen response's and the rejected one's, their margin too."""
    responses = ("target",) if isinstance(batch, TokenBatch) else ("chosen", "rejected")
    samples = []
    for row, numbers in enumerate(values[:count].tolist()):
        sample: dict[str, Any] = {}
        for place, response in enumerate(responses):
            index = (row,) if isinstance(batch, TokenBatch) else (row, place)
            tokens = batch.tokens[index][: int(batch.lengths[index])].tolist()
            start = int(batch.response_mask[index].int().argmax()) + 1  # column t of the mask speaks of token t + 1
            sample.setdefault("prompt", tokenizer.decode(tokens[:start]))
            sample[response] = tokenizer.decode(tokens[start:], after=tokens[:start])
        sample |= dict(zip(names, numbers, strict=True))
        samples.append(sample if len(numbers) == 1 else {**sample, "margin": numbers[0] - numbers[1]})
    return samples
