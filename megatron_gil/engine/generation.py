"""Sampling responses with a key-value cache under any tensor- and pipeline-parallel layout.

Rows need no left padding: the cache keeps each row's positions (models/attention.py), so all rows of a batch are at
the same step of their response. Randomness is one uniform number per row and step, a pure function of (seed, sample id,
step): samples do not depend on the layout, on the batch or on what was sampled before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_gil.algo.sampling import choose_tokens, penalize_repetition
from megatron_gil.config import SamplingSection
from megatron_gil.engine.megatron import MegatronModel
from megatron_gil.models.attention import PromptContext
from megatron_gil.parallel.collectives import share_from_last_pp_stage
from megatron_gil.parallel.pipeline import receive_from_previous_pp_stage, send_to_next_pp_stage
from megatron_gil.types import PromptBatch, Rollout, concat_rows, take_rows


class TokenIds(Protocol):
    """What the generator needs of a tokenizer."""

    pad_id: int
    eos_ids: tuple[int, ...]


class Generator:
    """Answers prompts with one model's current weights."""

    def __init__(
        self,
        model: MegatronModel,
        section: SamplingSection,
        *,
        tokenizer: TokenIds,
        seed: int,
    ) -> None:
        self._model, self._section, self._pad_id, self._seed = model, section, tokenizer.pad_id, seed
        self.micro_size = section.micro_size
        self._eos_ids = torch.tensor(tokenizer.eos_ids, device=model.layout.device)

    @torch.no_grad()
    def sample(
        self, prompts: PromptBatch, *, before_chunk: Callable[[PromptBatch], None] = lambda chunk: None
    ) -> Rollout:
        """One response per row: up to max_new_tokens, or to the first end-of-sequence token, which is kept.

        before_chunk: called with each micro_size rows that are about to be answered.
        """
        size = self.micro_size
        chunks = [take_rows(prompts, slice(i, i + size)) for i in range(0, len(prompts.tokens), size)]
        self._model.module.eval()
        with _without_sequence_parallel(self._model.module):
            rollouts = []
            for chunk in chunks:
                before_chunk(chunk)
                rollouts.append(self._sample_chunk(chunk))
        return _trim(concat_rows(rollouts))

    def _sample_chunk(self, prompts: PromptBatch) -> Rollout:
        section, device = self._section, prompts.tokens.device
        num_rows, prompt_width = prompts.tokens.shape
        uniforms = _uniforms(self._seed, prompts.sample_ids, section.max_new_tokens).to(device)
        responses = torch.full((num_rows, section.max_new_tokens), self._pad_id, device=device)
        log_probs = torch.zeros(num_rows, section.max_new_tokens, device=device)
        finished = torch.zeros(num_rows, dtype=torch.bool, device=device)
        counts = torch.zeros_like(prompts.lengths)
        context = PromptContext(prompts.lengths, prompt_width, section.max_new_tokens)
        if context.prompt_columns:
            self._forward(prompts.tokens[:, : context.prompt_columns], context, None)
        newest = prompts.tokens.gather(1, prompts.lengths[:, None] - 1)  # fed again alone: its logits choose the first
        for step in range(section.max_new_tokens):
            logits = self._forward(newest, context, context.hidden())
            chosen, chosen_log_probs = self._choose(logits, prompts, responses, step, uniforms[:, step])
            responses[:, step] = torch.where(finished, self._pad_id, chosen)
            log_probs[:, step] = torch.where(finished, 0.0, chosen_log_probs)
            counts += ~finished
            finished |= torch.isin(chosen, self._eos_ids)
            if bool(finished.all()):
                break
            newest = chosen[:, None]
        return _join(prompts, responses, log_probs, counts, finished, self._pad_id)

    def _choose(
        self, logits: Tensor | None, prompts: PromptBatch, responses: Tensor, step: int, uniforms: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(token number `step` of each response, its log-prob), chosen on the last pp_stage and shared."""
        section, choice = self._section, None
        if logits is not None:
            if section.repetition_penalty != 1.0:
                columns = torch.arange(prompts.tokens.shape[1], device=logits.device)
                so_far = torch.cat([prompts.tokens, responses[:, :step]], dim=1)
                is_real = torch.cat(
                    [columns < prompts.lengths[:, None], torch.ones_like(responses[:, :step]) > 0], dim=1
                )
                logits = penalize_repetition(logits, so_far, is_real, section.repetition_penalty)
            if step < section.min_new_tokens - 1:
                logits = logits.index_fill(1, self._eos_ids, float("-inf"))
            tokens, log_probs = choose_tokens(
                logits, uniforms, temperature=section.temperature, top_k=section.top_k, top_p=section.top_p
            )
            choice = torch.stack([tokens.double(), log_probs.double()])
        choice = share_from_last_pp_stage(choice, (2, len(uniforms)), torch.float64, self._model.layout)
        return choice[0].long(), choice[1].float()

    def _forward(self, tokens: Tensor, context: PromptContext, hidden: Tensor | None) -> Tensor | None:
        """Logits [B, V] float32 after the last of `tokens` [B, n], on the last pipeline rank; None elsewhere.

        hidden: which cached columns each row must not see, bool.
        """
        model, layout = self._model, self._model.layout
        num_rows, count = tokens.shape
        model.module.set_input_tensor(
            receive_from_previous_pp_stage((count, num_rows, model.spec.hidden_size), model.dtype, layout)  # type: ignore[arg-type]  None on the first stage
        )
        output = model.module(tokens, None, hidden, inference_context=context, runtime_gather_output=True)
        context.sequence_len_offset += count
        if not layout.is_last_pp_stage:
            send_to_next_pp_stage(output, layout)
            return None
        return output[:, -1, : model.spec.vocab_size].float()


def _uniforms(seed: int, sample_ids: Tensor, count: int) -> Tensor:
    """[B, count] numbers in [0, 1): row i depends on (seed, sample_ids[i]) alone (numpy's counter-based Philox)."""
    rows = [np.random.Generator(np.random.Philox(key=[seed, int(i)])).random(count, np.float32) for i in sample_ids]
    return torch.from_numpy(np.stack(rows))


def _join(
    prompts: PromptBatch, responses: Tensor, log_probs: Tensor, counts: Tensor, finished: Tensor, pad_id: int
) -> Rollout:
    """Each response [B, max_new_tokens] right behind its prompt; no wider than the longest row that can be."""
    num_rows, prompt_width = prompts.tokens.shape
    width = prompt_width + responses.shape[1]
    steps = torch.arange(responses.shape[1], device=responses.device)
    places = prompts.lengths[:, None] + steps
    written = steps < counts[:, None]
    tokens = torch.full((num_rows, width), pad_id, device=responses.device)
    tokens[:, :prompt_width] = prompts.tokens
    tokens = tokens.scatter(1, places, torch.where(written, responses, pad_id))
    by_column = torch.zeros(num_rows, width - 1, device=responses.device)
    return Rollout(
        tokens=tokens,
        lengths=prompts.lengths + counts,
        prompt_lengths=prompts.lengths,
        response_mask=torch.zeros_like(by_column, dtype=torch.bool).scatter(1, places - 1, written),
        sampled_log_probs=by_column.scatter(1, places - 1, log_probs),
        finished=finished,
        row_ids=prompts.row_ids,
        sample_ids=prompts.sample_ids,
        known_groups=prompts.known_groups,
    )


def _trim(rollout: Rollout) -> Rollout:
    """Without the columns that no row of this rank reaches."""
    width = int(rollout.lengths.max())
    return replace(
        rollout,
        tokens=rollout.tokens[:, :width].contiguous(),
        response_mask=rollout.response_mask[:, : width - 1].contiguous(),
        sampled_log_probs=rollout.sampled_log_probs[:, : width - 1].contiguous(),
    )


@contextmanager
def _without_sequence_parallel(module: torch.nn.Module) -> Iterator[None]:
    """Decoding feeds one position at a time, which cannot be cut over tensor-parallel ranks."""
    names = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
    holders = [*module.modules(), *{id(c): c for m in module.modules() if (c := getattr(m, "config", None))}.values()]
    on = [(holder, name) for holder in holders for name in names if getattr(holder, name, False) is True]
    for holder, name in on:
        setattr(holder, name, False)
    try:
        yield
    finally:
        for holder, name in on:
            setattr(holder, name, True)
