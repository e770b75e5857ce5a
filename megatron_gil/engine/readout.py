"""From a model's raw output to a Readout: the one place where tokens are shifted.

Column t of every [B, S] tensor speaks of choosing tokens[:, t + 1]; it is read from the hidden state at position t.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_gil.models.llama import Head
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.parallel.vocab import vocab_parallel_entropy, vocab_parallel_log_probs
from megatron_gil.types import Readout


def read_output(
    output: Tensor,
    batch: Any,
    *,
    head: Head,
    vocab_size: int,
    layout: ParallelLayout,
    entropy: bool,
    temperature: float,
) -> Readout:
    """The Readout of one microbatch on the last pipeline rank.

    output: [R, >= T, V / tp | 1 | 1 + M], R the rows with the batch's leading axes flattened; positions past T are
    padding of the engine's own. temperature: of log-probs and entropy.
    """
    tokens = batch.tokens.flatten(0, -2)  # [R, T]
    leading = batch.tokens.shape[:-1]
    num_columns = tokens.shape[1] - 1  # S
    if head == "lm":
        # The last position and padding predict nothing; dropping their answers instead of their logits saves a copy.
        targets = pad(tokens[:, 1:], (0, output.shape[1] - num_columns))
        log_probs = vocab_parallel_log_probs(
            output, targets, layout.tp_pg, vocab_size=vocab_size, temperature=temperature
        )
        log_probs = log_probs[:, :num_columns].unflatten(0, leading)
        if not entropy:
            return Readout(log_probs=log_probs)
        nats = vocab_parallel_entropy(output, layout.tp_pg, vocab_size=vocab_size, temperature=temperature)
        return Readout(log_probs=log_probs, entropy=nats[:, :num_columns].unflatten(0, leading))
    output = output.to(torch.promote_types(output.dtype, torch.float32))
    rows = torch.arange(len(tokens), device=tokens.device)
    last = output[rows, batch.lengths.flatten() - 1]  # [R, 1 | 1 + M]
    if head == "score":
        return Readout(scores=last[:, 0].unflatten(0, leading))
    return Readout(
        values=output[:, :num_columns, 0].unflatten(0, leading),
        group_logits=last[:, 1:].unflatten(0, leading) if output.shape[-1] > 1 else None,
    )
