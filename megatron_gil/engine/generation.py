"""Sampling responses with a key-value cache under any tensor- and pipeline-parallel layout.

Rows need no left padding: decoding starts at the shortest prompt, and a row whose prompt is longer is fed its own
prompt tokens until they end. Randomness is one uniform number per row and position, a pure function of
(seed, sample id, position), so that samples do not depend on the layout, the batch or what was sampled before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from megatron_gil.algo.sampling import choose_tokens, penalize_repetition
from megatron_gil.config import SamplingSection
from megatron_gil.engine.megatron import MegatronModel
from megatron_gil.parallel.collectives import share_from_last_pp_stage
from megatron_gil.parallel.pipeline import receive_from_previous_pp_stage, send_to_next_pp_stage
from megatron_gil.types import PromptBatch, Rollout, concat_rows, take_rows


class Generator:
    """Answers prompts with one model's current weights."""

    def __init__(
        self,
        model: MegatronModel,
        section: SamplingSection,
        *,
        eos_ids: tuple[int, ...],
        pad_id: int,
        seed: int,
    ) -> None:
        self._model, self._section, self._pad_id, self._seed = model, section, pad_id, seed
        self._eos_ids = torch.tensor(eos_ids, device=model.layout.device)

    @torch.no_grad()
    def sample(self, prompts: PromptBatch) -> Rollout:
        """One response per row: up to max_new_tokens, or to the first end-of-sequence token, which is kept."""
        size = self._section.micro_size
        chunks = [take_rows(prompts, slice(i, i + size)) for i in range(0, len(prompts.tokens), size)]
        with _without_sequence_parallel(self._model.module):
            rollouts = [self._sample_chunk(chunk) for chunk in chunks]
        return _trim(concat_rows(rollouts))

    def _sample_chunk(self, prompts: PromptBatch) -> Rollout:
        section, device = self._section, prompts.tokens.device
        num_rows, prompt_width = prompts.tokens.shape
        width = prompt_width + section.max_new_tokens
        tokens = torch.full((num_rows, width), self._pad_id, device=device)
        tokens[:, :prompt_width] = prompts.tokens
        log_probs = torch.zeros(num_rows, width - 1, device=device)
        lengths, finished = prompts.lengths.clone(), torch.zeros(num_rows, dtype=torch.bool, device=device)
        uniforms = _uniforms(self._seed, prompts.sample_ids, section.max_new_tokens).to(device)
        context = StaticInferenceContext(num_rows, width)
        start, position = 0, int(prompts.lengths.min())  # position: of the token to choose next
        while position < width:
            chosen, chosen_log_probs = self._next_tokens(tokens, start, position, prompts.lengths, uniforms, context)
            writing = (prompts.lengths <= position) & ~finished & (position < prompts.lengths + section.max_new_tokens)
            tokens[:, position] = torch.where(writing, chosen, tokens[:, position])
            log_probs[:, position - 1] = torch.where(writing, chosen_log_probs, 0.0)
            lengths += writing
            finished |= writing & torch.isin(chosen, self._eos_ids)
            start, position = position, position + 1
            if bool((finished | (lengths >= prompts.lengths + section.max_new_tokens)).all()):
                break
        columns = torch.arange(1, width, device=device)
        return Rollout(
            tokens=tokens,
            lengths=lengths,
            prompt_lengths=prompts.lengths,
            response_mask=(columns >= prompts.lengths[:, None]) & (columns < lengths[:, None]),
            sampled_log_probs=log_probs,
            finished=finished,
            row_ids=prompts.row_ids,
            sample_ids=prompts.sample_ids,
            known_groups=prompts.known_groups,
        )

    def _next_tokens(
        self,
        tokens: Tensor,
        start: int,
        position: int,
        prompt_lengths: Tensor,
        uniforms: Tensor,
        context: StaticInferenceContext,
    ) -> tuple[Tensor, Tensor]:
        """Feed tokens[:, start:position] to the cache and choose the token at `position`; same on every rank."""
        layout, section = self._model.layout, self._section
        logits = self._forward(tokens[:, start:position], context)
        choice = None
        if logits is not None:
            step = (
                position - prompt_lengths
            )  # [B] how many tokens of the response there are; negative inside the prompt
            if section.repetition_penalty != 1.0:
                present = torch.arange(tokens.shape[1], device=tokens.device) < position
                logits = penalize_repetition(logits, tokens, present.expand_as(tokens), section.repetition_penalty)
            early = (step < section.min_new_tokens - 1)[:, None]
            ends = torch.zeros_like(logits, dtype=torch.bool)
            ends[:, self._eos_ids] = True
            chosen, log_probs = choose_tokens(
                logits.masked_fill(early & ends, float("-inf")),
                uniforms.gather(1, step.clamp(0, uniforms.shape[1] - 1)[:, None])[:, 0],
                temperature=section.temperature,
                top_k=section.top_k,
                top_p=section.top_p,
            )
            choice = torch.stack([chosen.double(), log_probs.double()])
        choice = share_from_last_pp_stage(choice, (2, len(tokens)), torch.float64, layout)
        return choice[0].long(), choice[1].float()

    def _forward(self, tokens: Tensor, context: StaticInferenceContext) -> Tensor | None:
        """Logits [B, V] float32 after the last of `tokens` [B, n], on the last pipeline rank; None elsewhere."""
        model, layout = self._model, self._model.layout
        num_rows, count = tokens.shape
        offset = context.sequence_len_offset
        positions = torch.arange(offset, offset + count, device=tokens.device).expand_as(tokens)
        model.module.eval()
        shape = (count, num_rows, model.spec.hidden_size)
        model.module.set_input_tensor(receive_from_previous_pp_stage(shape, model.dtype, layout))
        output = model.module(tokens, positions, None, inference_context=context, runtime_gather_output=True)
        context.sequence_len_offset += count
        if not layout.is_last_pp_stage:
            send_to_next_pp_stage(output, layout)
            return None
        return output[:, -1, : model.spec.vocab_size].float()


def _uniforms(seed: int, sample_ids: Tensor, count: int) -> Tensor:
    """[B, count] numbers in [0, 1): row i depends on (seed, sample_ids[i]) alone (numpy's counter-based Philox)."""
    rows = [np.random.Generator(np.random.Philox(key=[seed, int(i)])).random(count, np.float32) for i in sample_ids]
    return torch.from_numpy(np.stack(rows))


def _trim(rollout: Rollout) -> Rollout:
    """Without the columns that no row of this rank reaches."""
    width = int(rollout.lengths.max())
    return Rollout(
        tokens=rollout.tokens[:, :width].contiguous(),
        lengths=rollout.lengths,
        prompt_lengths=rollout.prompt_lengths,
        response_mask=rollout.response_mask[:, : width - 1].contiguous(),
        sampled_log_probs=rollout.sampled_log_probs[:, : width - 1].contiguous(),
        finished=rollout.finished,
        row_ids=rollout.row_ids,
        sample_ids=rollout.sample_ids,
        known_groups=rollout.known_groups,
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
