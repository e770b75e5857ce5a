"""From a model's hidden states to a Readout: the one place where tokens are shifted, and where it is decided what is
read. Log-probs, entropy and values are of response tokens alone, group logits and scores of each row's last token.

Column t of every [B, S] tensor speaks of choosing tokens[:, t + 1]; it is read from the hidden state at position t.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_gil.engine.packing import Microbatch
from megatron_gil.models.families import Head
from megatron_gil.models.heads import output_weight
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.parallel.vocab import vocab_parallel_log_probs, vocab_parallel_log_probs_and_entropy
from megatron_gil.types import Readout


def read_output(
    output: Tensor,
    microbatch: Microbatch,
    model: Any,
    *,
    head: Head,
    vocab_size: int,
    layout: ParallelLayout,
    entropy: bool,
    temperature: float,
) -> Readout:
    """The Readout of one microbatch on the last pipeline rank; 0 in the columns that are not of a response.

    output: [1, N, H], or this rank's [1, N / tp, H] under sequence parallelism. model: its output layer is read.
    temperature: of log-probs and entropy.
    """
    hidden = output[0]
    if layout.sequence_parallel:
        # A rank reads its own columns of the vocabulary, so that gradients are summed. A scalar head is the same on
        # every rank, and each computes the whole loss: it keeps its part, and a sum would count it tp times.
        hidden = gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=head == "lm", group=layout.tp_pg
        )
    leading = microbatch.rows.tokens.shape[:-1]
    if head == "score":
        last = hidden[microbatch.last_places()]
        return Readout(scores=_widened(model.output_layer.score(last)).squeeze(1).unflatten(0, leading))
    columns = microbatch.columns()
    chosen = hidden[microbatch.places_of(columns)]  # [n, H]

    def spread(found: Tensor) -> Tensor:
        """[n] -> [B, S]."""
        mask = microbatch.rows.response_mask
        return found.new_zeros(mask.numel()).scatter(0, columns, found).view(mask.shape)

    if head == "critic":
        values = spread(_widened(model.output_layer.score(chosen)).squeeze(1))
        group_head = model.output_layer.group_head
        if group_head is None:
            return Readout(values=values)
        group_logits = _widened(group_head(hidden[microbatch.last_places()]))
        return Readout(values=values, group_logits=group_logits.unflatten(0, leading))
    if layout.tp_size > 1 and not layout.sequence_parallel:
        chosen = copy_to_tensor_model_parallel_region(chosen, group=layout.tp_pg)
    targets = microbatch.rows.tokens[..., 1:].flatten()[columns]
    given = (chosen, output_weight(model), targets, layout.tp_pg)
    if entropy:
        log_probs, nats = vocab_parallel_log_probs_and_entropy(*given, vocab_size=vocab_size, temperature=temperature)
        return Readout(log_probs=spread(log_probs), entropy=spread(nats))
    log_probs = vocab_parallel_log_probs(*given, vocab_size=vocab_size, temperature=temperature)
    return Readout(log_probs=spread(log_probs))


def _widened(output: Tensor) -> Tensor:
    """At least float32, whatever the model's dtype."""
    return output.to(torch.promote_types(output.dtype, torch.float32))
