"""Sampling responses: every rank of a model copy that differs in its pipeline place answers rows of its own.

Randomness is one uniform number per row and step, a pure function of (seed, sample id, step). So samples do not depend
on the layout, on the slots or on what was sampled before, up to rounding: tensor-parallel ranks add numbers in another
order, and a uniform number that lies close to the border between two tokens may then fall on its other side. From there
on that response is another one, drawn from the same distribution.

How often, measured with stories260k (2,048 responses of 120 tokens, temperature 1, on the CPU): of two tensor-parallel
ranks against one, 4 draws of 245,532 differed in float32, and in bfloat16, whose rounding is 65,536 times as coarse,
2,041 of 56,959; only the first that differs in a response is counted, and nothing after it. Two pipeline ranks changed
no draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_gil.config import SamplingSection
from megatron_gil.engine.decoder import Decoder
from megatron_gil.engine.decoder_weights import collect_weights
from megatron_gil.engine.megatron import MegatronModel
from megatron_gil.engine.protocol import Meet
from megatron_gil.engine.slots import BUCKET, Answers, Slots
from megatron_gil.parallel.collectives import begin_max_over_ranks, concat_over_pp, min_over_ranks
from megatron_gil.types import PromptBatch, Rollout, take_rows

SAMPLING_BYTES = 32
"""Of a logit while a token is chosen: what planning/memory.py counts too."""


class TokenIds(Protocol):
    """What the generator needs of a tokenizer."""

    pad_id: int
    eos_ids: tuple[int, ...]


class Generator:
    """Answers prompts with one model's current weights (a Sampler of engine/protocol.py)."""

    def __init__(
        self,
        model: MegatronModel,
        section: SamplingSection,
        *,
        tokenizer: TokenIds,
        seed: int,
    ) -> None:
        self._model, self._section, self._seed = model, section, seed
        self._pad_id, self._eos_ids = tokenizer.pad_id, tokenizer.eos_ids

    @torch.no_grad()
    def sample(self, prompts: PromptBatch, *, meet: Meet | None = None) -> Rollout:
        """One response per row: up to max_new_tokens, or to the first end-of-sequence token, which is kept.

        Every rank of the world calls it together, some perhaps without rows.
        """
        layout, num_rows = self._model.layout, len(prompts.tokens)
        share = -(-num_rows // layout.pp_size)
        mine = take_rows(prompts, slice(layout.pp_rank * share, (layout.pp_rank + 1) * share))
        answers = self._answer(mine, meet or self._meet)

        def gather(part: Tensor) -> Tensor:
            """The rows of all pipeline ranks. Each gives `share` rows: the last of `part`, a dummy, fills up."""
            if num_rows == 0:
                return part[:0]
            fill = part[-1:].expand(share - len(mine.tokens), *part.shape[1:])
            return concat_over_pp(torch.cat([part[:-1], fill]), layout)[:num_rows]

        tokens, log_probs, lengths = (gather(p) for p in (answers.tokens, answers.log_probs, answers.lengths))
        return _join(
            prompts, tokens, log_probs, lengths, torch.tensor(self._eos_ids, device=tokens.device), self._pad_id
        )

    def _answer(self, prompts: PromptBatch, meet: Meet) -> Answers:
        """Answer this rank's own rows. The decoder with its cache is made here and freed at the end."""
        model, section = self._model, self._section
        uniforms = _uniforms(self._seed, prompts.sample_ids, section.max_new_tokens).to(prompts.tokens.device)
        answers = Answers(prompts, uniforms, self._pad_id)
        weights, columns = collect_weights(model), num_columns(prompts.tokens.shape[1], section.max_new_tokens)
        num_slots = section.micro_size or _default_slots(model, columns)
        num_slots = max(1, min(num_slots, len(prompts.tokens)))
        decoder = Decoder(weights, model.spec, model.layout, num_slots=num_slots, num_columns=columns)
        capture = section.cuda_graphs == "auto" and model.layout.device.type == "cuda"
        slots = Slots(decoder, prompts, answers, section, eos_ids=self._eos_ids, capture=capture)
        while True:
            any_rank_is_busy = meet(slots.busy)
            slots.advance()
            if not any_rank_is_busy():
                break
        slots.finish()
        return answers

    def _meet(self, busy: bool) -> Callable[[], bool]:
        finish = begin_max_over_ranks(int(busy), self._model.layout)
        return lambda: bool(finish())


def _default_slots(model: MegatronModel, columns: int) -> int:
    """For sampling.micro_size=null: what fits into half of the free GPU memory, at most 256; 64 on the CPU. The same on
    all ranks, because the tensor-parallel ranks of a model copy must fill their slots alike."""
    spec, device = model.spec, model.layout.device
    if device.type != "cuda":
        return 64
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    cache = 2 * spec.num_layers * spec.num_kv_heads // model.layout.tp_size * spec.head_dim * columns
    slot = cache * model.dtype.itemsize + SAMPLING_BYTES * spec.vocab_size
    return min(256, 2 ** int(math.log2(max(1, min_over_ranks(free // (2 * slot), model.layout)))))


def num_columns(prompt_tokens: int, new_tokens: int) -> int:
    """Positions of the cache for rows of this length, rounded up to a multiple of BUCKET."""
    return -(-(prompt_tokens + new_tokens) // BUCKET) * BUCKET


def _uniforms(seed: int, sample_ids: Tensor, count: int) -> Tensor:
    """[B, count] numbers in [0, 1): row i depends on (seed, sample_ids[i]) alone (numpy's counter-based Philox)."""
    ids = sample_ids.tolist()
    rows = [np.random.Generator(np.random.Philox(key=[seed, i])).random(count, np.float32) for i in ids]
    return torch.from_numpy(np.array(rows, dtype=np.float32).reshape(len(ids), count))


def _join(
    prompts: PromptBatch, tokens: Tensor, log_probs: Tensor, lengths: Tensor, eos_ids: Tensor, pad_id: int
) -> Rollout:
    """The rollout: what was written behind the end of a row becomes padding, unused columns are cut off."""
    width = int(lengths.max()) if len(lengths) else prompts.tokens.shape[1]
    columns = torch.arange(width, device=tokens.device)
    tokens = torch.where(columns < lengths[:, None], tokens[:, :width], pad_id)
    mask = (columns[:-1] >= prompts.lengths[:, None] - 1) & (columns[:-1] < lengths[:, None] - 1)
    return Rollout(
        tokens=tokens,
        lengths=lengths,
        prompt_lengths=prompts.lengths,
        response_mask=mask,
        sampled_log_probs=torch.where(mask, log_probs[:, : width - 1], 0),
        finished=torch.isin(tokens.gather(1, lengths[:, None] - 1)[:, 0], eos_ids),
        row_ids=prompts.row_ids,
        sample_ids=prompts.sample_ids,
        known_groups=prompts.known_groups,
    )
