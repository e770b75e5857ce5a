"""Log-probabilities and entropy of logits whose vocabulary is cut over tensor-parallel ranks.

Rank r of tp holds columns [r * W, (r + 1) * W) of the padded vocabulary, W = logits.shape[-1]. Columns at or beyond
`vocab_size` are padding: probability and gradient exactly 0. Rows are taken in chunks, so that only the logits
themselves and their gradient ever have their full size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 22  # 16 MiB of float32 at a time


def vocab_parallel_log_probs(
    logits: Tensor, targets: Tensor, tp_pg: dist.ProcessGroup, *, vocab_size: int, temperature: float = 1.0
) -> Tensor:
    """log softmax(logits / temperature)[target]: logits [..., V / tp], targets [...] int64 -> [...].

    float32, or float64 for float64; the same on every rank. Contiguous logits are not copied. So hand over all
    positions, and drop the last column of the result.
    """
    return _LogProbs.apply(logits, targets, tp_pg, vocab_size, temperature)  # type: ignore[return-value]


@torch.no_grad()
def vocab_parallel_entropy(
    logits: Tensor, tp_pg: dist.ProcessGroup, *, vocab_size: int, temperature: float = 1.0
) -> Tensor:
    """-sum_v p_v log p_v in nats, p = softmax(logits / temperature): logits [..., V / tp] -> [...], float32, or float64
    for float64; no gradient."""
    rows = logits.reshape(-1, logits.shape[-1])
    num_real = _num_real_columns(rows, tp_pg, vocab_size)
    peak = _local_peak(rows, num_real)
    _all_reduce(peak, dist.ReduceOp.MAX, tp_pg)
    sums = torch.empty(2, len(rows), dtype=peak.dtype, device=rows.device)  # of exp(x - peak) and of exp(x - peak) x
    for chunk in _chunks(rows):
        shifted = _shift(rows[chunk, :num_real], peak[chunk, None], temperature)
        weights = shifted.exp()
        sums[0, chunk] = weights.sum(-1)
        sums[1, chunk] = weights.mul_(shifted).sum(-1)
    _all_reduce(sums, dist.ReduceOp.SUM, tp_pg)
    return (sums[0].log() - sums[1] / sums[0]).view(logits.shape[:-1])


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, tp_pg: dist.ProcessGroup, vocab_size: int, temperature: float
    ) -> Tensor:
        rows, flat_targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
        num_real = _num_real_columns(rows, tp_pg, vocab_size)
        peak = _local_peak(rows, num_real)
        _all_reduce(peak, dist.ReduceOp.MAX, tp_pg)
        columns, is_here = _local_columns(flat_targets, rows, tp_pg)
        target_logits = _shift(rows.gather(1, columns[:, None]).squeeze(1), peak, temperature)
        # Two sums over ranks: of exp(x - peak), and of the target's logit, which is 0 on all ranks but the one that
        # holds it.
        sums = torch.stack([torch.zeros_like(peak), torch.where(is_here, target_logits, 0)])
        for chunk in _chunks(rows):
            sums[0, chunk] = _shift(rows[chunk, :num_real], peak[chunk, None], temperature).exp_().sum(-1)
        _all_reduce(sums, dist.ReduceOp.SUM, tp_pg)
        ctx.save_for_backward(rows, columns, is_here, peak, sums[0])
        ctx.num_real, ctx.shape, ctx.temperature = num_real, logits.shape, temperature
        return (sums[1] - sums[0].log()).view(targets.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        """(1[v = target] - softmax_v) * grad / temperature, from the saved logits, their peak and sum, without
        communication."""
        rows, columns, is_here, peak, exp_sum = ctx.saved_tensors
        grad = grads[0].reshape(-1) / ctx.temperature
        grad_rows = torch.zeros_like(rows) if ctx.num_real < rows.shape[1] else torch.empty_like(rows)
        for chunk in _chunks(rows):
            part = _shift(rows[chunk, : ctx.num_real], peak[chunk, None], ctx.temperature).exp_()
            part.mul_(-(grad[chunk] / exp_sum[chunk])[:, None])
            at_target = torch.where(is_here[chunk], grad[chunk], 0)
            part.scatter_add_(1, columns[chunk, None], at_target[:, None])
            grad_rows[chunk, : ctx.num_real] = part  # the only rounding to the logits' dtype
        return grad_rows.view(ctx.shape), None, None, None, None


def _num_real_columns(rows: Tensor, tp_pg: dist.ProcessGroup, vocab_size: int) -> int:
    width = rows.shape[1]
    num_real = min(width, vocab_size - tp_pg.rank() * width)
    assert num_real > 0, (vocab_size, width, tp_pg.rank())
    return num_real


def _local_columns(targets: Tensor, rows: Tensor, tp_pg: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Column of each target on this rank (0 where it is elsewhere), and whether it is here."""
    local = targets - tp_pg.rank() * rows.shape[1]
    is_here = (local >= 0) & (local < rows.shape[1])
    return torch.where(is_here, local, 0), is_here


def _local_peak(rows: Tensor, num_real: int) -> Tensor:
    return _widen(rows[:, :num_real].amax(-1))


def _shift(logits: Tensor, peak: Tensor, temperature: float) -> Tensor:
    """(logits - peak) / temperature. The difference comes first: dividing large logits first would round them, and
    their difference would have fewer exact digits."""
    shifted = _widen(logits) - peak
    return shifted if temperature == 1.0 else shifted.div_(temperature)


def _widen(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _chunks(rows: Tensor) -> Iterator[slice]:
    size = max(1, _CHUNK_ELEMENTS // rows.shape[1])
    return (slice(start, start + size) for start in range(0, len(rows), size))


def _all_reduce(tensor: Tensor, op: Any, tp_pg: dist.ProcessGroup) -> None:
    if tp_pg.size() > 1:
        dist.all_reduce(tensor, op=op, group=tp_pg)
