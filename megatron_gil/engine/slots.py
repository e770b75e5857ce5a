"""A fixed number of slots in which rows are answered together; one that has ended takes the next row of the queue."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_gil.algo.sampling import choose_tokens, penalize_repetition
from megatron_gil.config import SamplingSection
from megatron_gil.engine.decoder import Decoder
from megatron_gil.engine.graphs import CapturedSteps
from megatron_gil.types import PromptBatch

STEPS = 16
"""At most so many tokens are chosen before the host looks which slots have ended."""
REFILL_SHARE = 8
"""New rows take the free slots once one slot in so many is free, so that several prompts are read together."""

BUCKET = 128
"""A step attends to a multiple of so many columns. Each number of columns needs a CUDA graph of its own, so there
should be few. Without graphs it is a multiple of a quarter of this."""
PREFILL_TOKENS = 1 << 14
"""At most so many tokens of prompts, padding included, are read at once, which limits the memory for it."""


class Answers:
    """The rows as far as they are answered: [B + 1, W], W = P + max_new_tokens + 1. Slots without a row write to the
    last row, which nobody reads."""

    def __init__(self, prompts: PromptBatch, uniforms: Tensor, pad_id: int) -> None:
        """uniforms: [B, max_new_tokens], the random numbers of each row's tokens."""
        num_rows, prompt_width = prompts.tokens.shape
        device, count = prompts.tokens.device, uniforms.shape[1]
        self.width = prompt_width + count + 1
        self.tokens = torch.full((num_rows + 1, self.width), pad_id, device=device)
        self.tokens[:num_rows, :prompt_width] = prompts.tokens
        self.log_probs = torch.zeros(num_rows + 1, self.width, device=device)
        self.lengths = torch.ones(num_rows + 1, dtype=torch.int64, device=device)
        """[B + 1] tokens of prompt and response together; valid once a row has ended."""
        columns = prompts.lengths[:, None] - 1 + torch.arange(count, device=device)
        self.uniforms = torch.zeros(num_rows + 1, self.width, device=device)
        self.uniforms[:num_rows].scatter_(1, columns, uniforms)  # in the column of the token before


class Slots:
    """The slots of one rank, and the queue of its rows. Every tensor of it is made here, once."""

    def __init__(
        self,
        decoder: Decoder,
        prompts: PromptBatch,
        answers: Answers,
        section: SamplingSection,
        *,
        eos_ids: Sequence[int],
        capture: bool,
    ) -> None:
        """prompts: the rows to answer, in the order in which they take slots."""
        self._decoder, self._answers, self._section = decoder, answers, section
        size, device, num_rows = decoder.num_slots, answers.tokens.device, len(prompts.tokens)
        self._rows = torch.full((size,), num_rows, device=device)
        self._offsets = self._rows * answers.width  # of its row among all columns of all rows
        self._limits, self._least = torch.zeros_like(self._rows), torch.zeros_like(self._rows)
        self._live = torch.zeros(size, dtype=torch.bool, device=device)
        self._eos_ids = torch.tensor(eos_ids, device=device)
        known = [token for token in eos_ids if token < decoder.spec.vocab_size]
        self._known_eos_ids = torch.tensor(known, dtype=torch.int64, device=device)
        self._columns = torch.arange(answers.width, device=device)
        self._shrinks, self._unit = not capture, BUCKET if capture else BUCKET // 4
        self._graphs = CapturedSteps() if capture else None
        lengths, tokens = prompts.lengths.tolist(), prompts.tokens.tolist()
        self._prompts = [tuple(row[:length]) for row, length in zip(tokens, lengths, strict=True)]
        self._queue = list(range(num_rows))[::-1]
        self._places = [-1] * size
        """Position of each slot when the host last looked; -1: it has ended."""
        self._ends = [0] * size
        """Position of the last token that each slot's row may have."""
        self._held: dict[int, tuple[int, ...]] = {}
        """slot -> the prompt whose keys and values its cache begins with: an equal prompt is copied, not read again."""

    @property
    def busy(self) -> bool:
        return bool(self._queue) or max(self._places) >= 0

    def advance(self) -> None:
        """Fill what is free, choose up to STEPS tokens in every slot, and look once which have ended."""
        self._fill()
        if self._shrinks and not self._queue:
            self._shrink()
        living = [(place, end) for place, end in zip(self._places, self._ends, strict=True) if place >= 0]
        if not living:
            return
        steps = min(STEPS, max(end - place for place, end in living))
        columns = math.ceil((max(place for place, _ in living) + steps) / self._unit) * self._unit
        for _ in range(steps):
            self._step(min(columns, self._decoder.num_columns))
        self._places = torch.where(self._live, self._decoder.position, -1).tolist()

    def finish(self) -> None:
        """Settle the lengths of the rows that were last in the slots."""
        self._answers.lengths.index_copy_(0, self._rows, self._decoder.position + 1)

    def _fill(self) -> None:
        free = [slot for slot, place in enumerate(self._places) if place < 0]
        if not self._queue or len(free) < max(1, len(self._places) // REFILL_SHARE):
            return
        rows = [self._queue.pop() for _ in range(min(len(free), len(self._queue)))]
        slots = free[: len(rows)]
        self._seat(slots, rows)
        copies, first, repeats = [], dict[tuple[int, ...], int](), []
        holders = {prompt: slot for slot, prompt in self._held.items()}
        for slot, row in zip(slots, rows, strict=True):
            prompt = self._prompts[row]
            if prompt in holders:
                copies.append((holders[prompt], slot))
            elif prompt in first:
                repeats.append((first[prompt], slot))
            else:
                first[prompt] = slot
            self._held[slot] = prompt
        self._copy(copies)  # first: prefill may overwrite the slots they come from
        for batch in _by_length([(slot, prompt) for prompt, slot in first.items()]):
            self._prefill(batch)
        self._copy(repeats)

    def _shrink(self) -> None:
        """At the end of the queue, go on without the slots that have ended once they are half of all."""
        living = [slot for slot, place in enumerate(self._places) if place >= 0]
        if not 0 < 2 * len(living) <= len(self._places):
            return
        self.finish()
        slots = torch.tensor(living, device=self._rows.device)
        self._decoder.keep(slots)
        self._rows, self._offsets, self._live = self._rows[slots], self._offsets[slots], self._live[slots]
        self._limits, self._least = self._limits[slots], self._least[slots]
        self._places, self._ends = [self._places[slot] for slot in living], [self._ends[slot] for slot in living]

    def _seat(self, slots: list[int], rows: list[int]) -> None:
        """The slots' state at the beginning of the rows; what was there is done with."""
        answers, decoder, section = self._answers, self._decoder, self._section
        starts = [len(self._prompts[row]) - 1 for row in rows]
        for slot, start in zip(slots, starts, strict=True):
            self._places[slot], self._ends[slot] = start, start + section.max_new_tokens
        device = self._rows.device
        slot_ids, row_ids, start_ids = torch.tensor([slots, rows, starts], device=device).unbind(0)
        answers.lengths.index_copy_(0, self._rows[slot_ids], decoder.position[slot_ids] + 1)
        for state, values in (
            (self._rows, row_ids),
            (self._offsets, row_ids * answers.width),
            (self._limits, start_ids + section.max_new_tokens),
            (self._least, start_ids + section.min_new_tokens - 1),
            (self._live, torch.ones_like(slot_ids, dtype=torch.bool)),
            (decoder.position, start_ids),
            (decoder.newest, answers.tokens[row_ids, start_ids]),
        ):
            state.index_copy_(0, slot_ids, values)
        decoder.show(slot_ids, start_ids)

    def _prefill(self, batch: list[tuple[int, tuple[int, ...]]]) -> None:
        """Of rows that are seated; the last token of a prompt is left to the first step."""
        width = max(len(prompt) for _, prompt in batch) - 1
        slots = torch.tensor([slot for slot, _ in batch], device=self._rows.device)
        self._decoder.prefill(self._answers.tokens[self._rows[slots], :width], slots)

    def _copy(self, pairs: list[tuple[int, int]]) -> None:
        pairs = [(source, target) for source, target in pairs if source != target]
        if pairs:
            sources, targets = torch.tensor(pairs, device=self._rows.device).unbind(1)
            self._decoder.copy(sources, targets, max(len(self._held[target]) for _, target in pairs))

    def _step(self, columns: int) -> None:
        if self._graphs is None:
            self._choose(columns)
        else:
            self._graphs(self._choose, columns)

    def _choose(self, columns: int) -> None:
        """One token for every slot. A slot that has ended goes on: its tokens land behind the end of its row."""
        decoder, answers, section = self._decoder, self._answers, self._section
        logits = decoder.step(columns)
        if section.repetition_penalty != 1.0:
            is_past = self._columns <= decoder.position[:, None]
            logits = penalize_repetition(
                logits, answers.tokens.index_select(0, self._rows), is_past, section.repetition_penalty
            )
        if section.min_new_tokens > 1 and len(self._known_eos_ids):
            ends = logits.index_select(1, self._known_eos_ids)
            ends = ends.masked_fill(decoder.position[:, None] < self._least[:, None], -math.inf)
            logits = logits.index_copy(1, self._known_eos_ids, ends)
        places = decoder.position + self._offsets
        tokens, log_probs = choose_tokens(
            logits,
            answers.uniforms.view(-1).index_select(0, places),
            temperature=section.temperature,
            top_k=section.top_k,
            top_p=section.top_p,
        )
        answers.tokens.view(-1)[1:].index_copy_(0, places, tokens)
        answers.log_probs.view(-1).index_copy_(0, places, log_probs)
        decoder.newest.copy_(tokens)
        decoder.position.add_(self._live)
        self._live.logical_and_((tokens[:, None] != self._eos_ids).all(1))
        self._live.logical_and_(decoder.position < self._limits)


def _by_length(prompts: list[tuple[int, tuple[int, ...]]]) -> list[list[tuple[int, tuple[int, ...]]]]:
    """(slot, prompt) in batches in which less than a quarter is padding; prompts of one token need no prefill."""
    batches: list[list[tuple[int, tuple[int, ...]]]] = []
    for slot, prompt in sorted(prompts, key=lambda pair: -len(pair[1])):
        if len(prompt) == 1:
            continue
        longest = len(batches[-1][0][1]) if batches else 0
        if batches and 4 * len(prompt) >= 3 * longest and longest * (len(batches[-1]) + 1) <= PREFILL_TOKENS:
            batches[-1].append((slot, prompt))
        else:
            batches.append([(slot, prompt)])
    return batches
