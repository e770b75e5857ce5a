"""The output layer and its log-probabilities in one, for a vocabulary that is cut over tensor-parallel ranks.

Rank r of tp holds rows [r * W, (r + 1) * W) of the padded vocabulary's weight, W = len(weight). Those at or beyond
`vocab_size` are padding: probability and gradient exactly 0. Positions are taken in chunks, so that the logits of all
of them are never there at once; where there are several chunks, the backward pass computes the logits again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 24  # logits at a time, 64 MiB of float32


def vocab_parallel_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, tp_pg: dist.ProcessGroup, *, vocab_size: int, temperature: float
) -> Tensor:
    """log softmax(hidden weight^T / temperature)[target]: hidden [n, H], weight [V / tp, H], targets [n] -> [n].

    float32, or float64 for float64; the same on every rank. The gradient of `hidden` is of this rank's part of the
    vocabulary: the caller sums it over tensor-parallel ranks.
    """
    return _LogProbs.apply(hidden, weight, targets, tp_pg, vocab_size, temperature)  # type: ignore[return-value]


@torch.no_grad()
def vocab_parallel_log_probs_and_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, tp_pg: dist.ProcessGroup, *, vocab_size: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """The log-probs [n], and -sum_v p_v log p_v [n] in nats, p the softmax; no gradient."""
    head = _Head(weight, tp_pg.rank() * len(weight), vocab_size, temperature)
    found = _sum_up(hidden, head, targets, tp_pg, entropy=True)
    return found.log_probs(), found.exp_sum.log() - found.weighted_sum / found.exp_sum


class _Head(NamedTuple):
    """This rank's part of the output layer."""

    weight: Tensor
    first: int  # token of its first row
    vocab_size: int
    temperature: float

    def logits(self, hidden: Tensor) -> Tensor:
        """[chunk, real columns], in the model's dtype."""
        num_real = min(len(self.weight), self.vocab_size - self.first)
        assert num_real > 0, (self.weight.shape, self.vocab_size, self.first)
        return hidden @ self.weight[:num_real].T

    def shift(self, logits: Tensor, peak: Tensor) -> Tensor:
        """(logits - peak) / temperature. The difference comes first: dividing large logits first would round them, and
        their difference would have fewer exact digits."""
        shifted = _widen(logits) - peak
        return shifted if self.temperature == 1.0 else shifted.div_(self.temperature)

    def columns(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each target on this rank (0 where it is elsewhere), and whether it is here."""
        local = targets - self.first
        is_here = (local >= 0) & (local < len(self.weight))
        return torch.where(is_here, local, 0), is_here


class _Sums(NamedTuple):
    """[n] each, over the whole vocabulary."""

    peak: Tensor
    """Largest logit, before the temperature."""
    exp_sum: Tensor
    """sum_v exp(x_v), x the shifted logits."""
    target: Tensor
    """x of the target."""
    weighted_sum: Tensor
    """sum_v exp(x_v) x_v; only where the entropy is asked for."""
    logits: Tensor | None
    """Of all positions, if they are one chunk."""

    def log_probs(self) -> Tensor:
        return self.target - self.exp_sum.log()


def _sum_up(hidden: Tensor, head: _Head, targets: Tensor, tp_pg: dist.ProcessGroup, *, entropy: bool) -> _Sums:
    columns, is_here = head.columns(targets)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    peak = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
    sums = torch.zeros(3, len(hidden), dtype=dtype, device=hidden.device)
    logits = None
    for chunk in _chunks(len(hidden), len(head.weight)):
        logits = None  # two chunks are never there at once
        logits = head.logits(hidden[chunk])
        peak[chunk] = _widen(logits.amax(-1))
        sums[1, chunk] = _widen(logits.gather(1, columns[chunk, None]).squeeze(1))
        _sum_exp(head.shift(logits, peak[chunk, None]), sums[:, chunk], entropy=entropy)
    sums[1] = head.shift(sums[1], peak)
    if tp_pg.size() > 1:
        peak = _over_ranks(sums, peak, is_here, head.temperature, tp_pg)
    exp_sum, target, weighted_sum = sums
    is_one_chunk = len(hidden) <= _chunk_size(len(head.weight))
    return _Sums(peak, exp_sum, target, weighted_sum, logits if is_one_chunk else None)


def _sum_exp(shifted: Tensor, sums: Tensor, *, entropy: bool) -> None:
    """Fill the first row of `sums`, and the last where the entropy is asked for; `shifted` is used up."""
    if not entropy:
        torch.sum(shifted.exp_(), -1, out=sums[0])
        return
    weights = shifted.exp()
    torch.sum(weights, -1, out=sums[0])
    torch.sum(weights.mul_(shifted), -1, out=sums[2])


def _over_ranks(sums: Tensor, peak: Tensor, is_here: Tensor, temperature: float, tp_pg: dist.ProcessGroup) -> Tensor:
    """The peak over all ranks; `sums`, which speak of this rank's peak, become those over all ranks."""
    whole = peak.clone()
    dist.all_reduce(whole, op=dist.ReduceOp.MAX, group=tp_pg)
    lower = (peak - whole) / temperature
    exp_sum, target, weighted_sum = sums
    # With x' = x + lower: sum exp(x') x' = exp(lower) (sum exp(x) x + lower sum exp(x)).
    weighted_sum.addcmul_(exp_sum, lower).mul_(lower.exp())
    exp_sum.mul_(lower.exp())
    target.copy_(torch.where(is_here, target + lower, 0))  # 0 on all ranks but the one that holds it
    dist.all_reduce(sums, group=tp_pg)
    return whole


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        tp_pg: dist.ProcessGroup,
        vocab_size: int,
        temperature: float,
    ) -> Tensor:
        head = _Head(weight, tp_pg.rank() * len(weight), vocab_size, temperature)
        found = _sum_up(hidden, head, targets, tp_pg, entropy=False)
        ctx.save_for_backward(hidden, weight, targets, found.peak, found.exp_sum, found.logits)
        ctx.head = head[1:]
        return found.log_probs()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        """(1[v = target] - softmax_v) * grad / temperature for each logit, without communication."""
        hidden, weight, targets, peak, exp_sum, saved = ctx.saved_tensors
        head = _Head(weight, *ctx.head)
        grad = grads[0] / head.temperature
        columns, is_here = head.columns(targets)
        grad_hidden = torch.empty_like(hidden)
        # Summed over chunks in float32 at least, whatever the weight's dtype.
        grad_weight = torch.zeros_like(weight, dtype=peak.dtype if saved is None else weight.dtype)
        for chunk in _chunks(len(hidden), len(weight)):
            part = head.shift(head.logits(hidden[chunk]) if saved is None else saved, peak[chunk, None]).exp_()
            part.mul_(-(grad[chunk] / exp_sum[chunk])[:, None])
            at_target = torch.where(is_here[chunk], grad[chunk], 0)
            part.scatter_add_(1, columns[chunk, None], at_target[:, None])
            rounded, part = part.to(hidden.dtype), None  # the only rounding to the model's dtype
            num_real = rounded.shape[1]
            torch.mm(rounded, weight[:num_real], out=grad_hidden[chunk])
            if grad_weight.dtype == hidden.dtype:
                grad_weight[:num_real].addmm_(rounded.T, hidden[chunk])
            else:
                grad_weight[:num_real] += rounded.T @ hidden[chunk]
            del rounded  # two chunks are never there at once
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _widen(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _chunk_size(num_columns: int) -> int:
    return max(1, _CHUNK_ELEMENTS // num_columns)


def _chunks(num_positions: int, num_columns: int) -> Iterator[slice]:
    size = _chunk_size(num_columns)
    return (slice(start, start + size) for start in range(0, num_positions, size))
