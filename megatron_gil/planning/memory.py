"""Bytes on one rank: weights, gradients, optimizer, activations, key-value cache, logits.

The counts follow what our own layers allocate (local layers; attention stores no scores), and tests/planning compares
them with what the engine does allocate. What they leave out is in `OVERHEAD_BYTES`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_gil.models.llama import Head, LlamaSpec
from megatron_gil.models.weight_table import Weight

GIB, MIB = 1 << 30, 1 << 20
OVERHEAD_BYTES = 4 * GIB
"""Estimate, ours: CUDA context and kernels 1 GiB, NCCL's buffers 1 GiB, what the allocator cannot use 2 GiB."""
CHUNK_ELEMENTS = 1 << 24
"""At most so many logits are there at a time (parallel/vocab.py)."""
CACHE_BUCKET = 128
"""The key-value cache has a multiple of so many columns (BUCKET of engine/slots.py)."""
PREFILL_TOKENS = 1 << 14
"""At most so many tokens of prompts are read at once, padding included (engine/slots.py)."""
SAMPLING_BYTES = 32
"""For each logit while a token is chosen: float32 copies, the sorted values with their indices, and running sums."""
HOST_BANDWIDTH = 20e9
"""Bytes per second between a GPU and pinned host memory (models.offload). Assumed: PCIe 4.0 has 32e9 at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """The sizes of a layout. Unlike a ParallelLayout it needs no processes."""

    tp_size: int = 1
    pp_size: int = 1
    dp_size: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False

    @property
    def num_gpus(self) -> int:
        return self.tp_size * self.pp_size * self.dp_size

    def __str__(self) -> str:
        return f"{self.tp_size} x {self.pp_size} x {self.dp_size}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SizedModel:
    """One model of a run."""

    role: str
    spec: LlamaSpec
    head: Head
    trained: bool
    num_groups: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    dtype_bytes: int = 2
    """Of weights and activations: 2 for bfloat16 (with float32 master weights), 4 for float32."""
    recompute: str = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What passes through a model at once on one rank."""

    num_rows: int
    num_tokens: int
    """The length of a row, padding included."""
    num_microbatches: int = 1

    @property
    def total(self) -> int:
        return self.num_rows * self.num_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """Bytes that one model holds from one iteration to the next; with models.offload, some of them on the host."""

    weights: int
    gradients: int = 0
    optimizer: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer

    def __add__(self, other: Resident) -> Resident:
        return Resident(
            weights=self.weights + other.weights,
            gradients=self.gradients + other.gradients,
            optimizer=self.optimizer + other.optimizer,
        )


def num_parameters(model: SizedModel, cut: Cut, pp_rank: int) -> int:
    """Parameters of one model on one rank."""
    table = model.spec.weights(model.head, model.num_groups)
    count = len(model.spec.layers_of(pp_rank, cut.pp_size)) * _num_elements(table.layer, cut)
    if pp_rank == 0:
        count += _num_elements(table.first, cut)
    if pp_rank == cut.pp_size - 1:
        # A tied head is the embedding itself where one rank holds both, else a copy of it.
        count += _num_elements((w for w in table.last if not (w.is_copy and pp_rank == 0)), cut)
    return count


def _num_elements(weights: Iterable[Weight], cut: Cut) -> int:
    """On one tensor-parallel rank."""
    return sum(weight.num_elements(cut.tp_size) for weight in weights)


def resident(model: SizedModel, cut: Cut, pp_rank: int, precision: Precision) -> Resident:
    """Weights; of a trained model also float32 gradients, Adam's moments and, beside bfloat16, master weights."""
    count = num_parameters(model, cut, pp_rank)
    if not model.trained:
        return Resident(weights=precision.dtype_bytes * count)
    state = 12 if precision.dtype_bytes == 2 else 8
    shared = cut.dp_size if cut.distributed_optimizer else 1
    return Resident(weights=precision.dtype_bytes * count, gradients=4 * count, optimizer=state * count // shared)


def waiting(model: SizedModel, held: Resident, offload: str, phase: str) -> Resident:
    """What models.offload keeps of a model off the device in a phase: rollout, score ROLE, update ROLE or step ROLE."""
    act, _, role = phase.partition(" ")
    if not model.trained:
        return Resident(weights=held.weights if offload != "none" and role != model.role else 0)
    if offload not in ("rollout", "all"):
        return Resident(weights=0)
    updates = act in ("update", "step")
    steps = updates if offload == "rollout" else phase == f"step {model.role}"
    return Resident(
        weights=0,
        gradients=0 if updates and role == model.role else held.gradients,
        optimizer=0 if steps else held.optimizer,
    )


def saved_activations(model: SizedModel, cut: Cut, pp_rank: int, rows: Rows, precision: Precision) -> int:
    """What the forward pass keeps for the backward pass, of all microbatches that are under way at once."""
    spec, size, tokens = model.spec, precision.dtype_bytes, rows.total
    layers = len(spec.layers_of(pp_rank, cut.pp_size))
    layer = _layer_bytes(spec, cut, rows, size)
    hidden = tokens * spec.hidden_size * size // (cut.tp_size if cut.sequence_parallel else 1)
    held = layers * hidden + layer if precision.recompute == "full" else layers * layer
    if pp_rank == cut.pp_size - 1 and precision.recompute != "full":  # else it is freed before a layer is recomputed
        held += _norm_bytes(spec, cut, tokens, size)
    passing = 0
    if cut.pp_size > 1:  # the schedule keeps what came from the rank before and what went to the next
        held += hidden * ((pp_rank > 0) + (pp_rank < cut.pp_size - 1))
        passing = 2 * hidden  # and one gradient each way
    return held * min(cut.pp_size - pp_rank, rows.num_microbatches) + passing


def saved_logits(model: SizedModel, cut: Cut, pp_rank: int, rows: Rows, precision: Precision) -> int:
    """What the output layer keeps of one microbatch for the backward pass: the hidden states that it reads, at most of
    all positions, and their logits if they are one chunk; none but on the last pipeline rank."""
    if not _has_logits(model, cut, pp_rank):
        return 0
    logits = rows.total * _vocab(model, cut)
    kept = logits if logits <= CHUNK_ELEMENTS else 0
    return (rows.total * model.spec.hidden_size + kept) * precision.dtype_bytes


def backward_work(model: SizedModel, cut: Cut, pp_rank: int, rows: Rows, precision: Precision) -> int:
    """The most that the backward pass has beside what was saved: gradients of the output layer, or of a layer's
    inside."""
    layer = 2 * rows.total * model.spec.ffn_size // cut.tp_size * precision.dtype_bytes
    gathered = _gathered_bytes(model.spec, cut, rows, precision)
    if not _has_logits(model, cut, pp_rank):
        return layer + gathered
    logits, hidden = rows.total * _vocab(model, cut), model.spec.hidden_size
    weight = _vocab(model, cut) * hidden
    gradients = 4 * weight + 2 * rows.total * hidden * precision.dtype_bytes
    chunk = min(CHUNK_ELEMENTS, logits) * (8 if precision.dtype_bytes == 2 else 4)  # in float32, and widened before
    if logits > CHUNK_ELEMENTS:  # the logits are computed again
        chunk += CHUNK_ELEMENTS * precision.dtype_bytes
        gradients += 2 * weight if precision.dtype_bytes == 2 else 0  # of one chunk, before it is added
    return max(chunk + gradients, layer) + gathered


def forward_work(model: SizedModel, cut: Cut, pp_rank: int, rows: Rows, precision: Precision) -> int:
    """The most that a pass without gradient has at once: the inside of a layer, or the logits of a chunk."""
    layer = layer_work(model.spec, cut, rows, precision)
    if not _has_logits(model, cut, pp_rank):
        return layer
    logits = rows.total * _vocab(model, cut)
    hidden = 2 * rows.total * model.spec.hidden_size * precision.dtype_bytes  # all, and those that are read
    chunk = min(CHUNK_ELEMENTS, logits) * (8 + precision.dtype_bytes)  # and in float32, shifted and its exponential
    return max(layer, chunk + hidden)


def layer_work(spec: LlamaSpec, cut: Cut, rows: Rows, precision: Precision) -> int:
    """Of one layer without gradient: the feed-forward part's inside and what goes around it."""
    inside = rows.total * precision.dtype_bytes * (5 * spec.ffn_size // cut.tp_size + 4 * spec.hidden_size)
    return inside + _gathered_bytes(spec, cut, rows, precision)


def key_value_cache(model: SizedModel, cut: Cut, rows: Rows, precision: Precision) -> int:
    """Keys and values of every layer, slot and column: a pipeline rank decodes rows of its own through all layers."""
    spec = model.spec
    columns = -(-rows.num_tokens // CACHE_BUCKET) * CACHE_BUCKET
    width = spec.num_kv_heads * spec.head_dim // cut.tp_size
    return 2 * spec.num_layers * rows.num_rows * columns * width * precision.dtype_bytes


def received_weights(model: SizedModel, cut: Cut, pp_rank: int, precision: Precision) -> int:
    """What a pipeline rank is sent of the other ranks' weights for as long as it decodes."""
    table = model.spec.weights(model.head, model.num_groups)
    num_layers = model.spec.num_layers - len(model.spec.layers_of(pp_rank, cut.pp_size))
    count = num_layers * _num_elements(table.layer, cut)
    if pp_rank > 0:
        count += _num_elements(table.first, cut)
    if pp_rank < cut.pp_size - 1:
        count += _num_elements((w for w in table.last if not w.is_copy), cut)
    return precision.dtype_bytes * count


def sampling_work(model: SizedModel, num_rows: int) -> int:
    """What is needed to choose the next token of every row from logits over the whole vocabulary."""
    return num_rows * model.spec.vocab_size * SAMPLING_BYTES


def prefill_work(model: SizedModel, cut: Cut, rows: Rows, precision: Precision) -> int:
    """The inside of one layer, for as many prompts as are read at once."""
    whole = Cut(tp_size=cut.tp_size)  # without sequence parallelism
    num_rows = min(rows.num_rows, max(1, PREFILL_TOKENS // rows.num_tokens))
    return layer_work(model.spec, whole, Rows(num_rows=num_rows, num_tokens=rows.num_tokens), precision)


def step_work(model: SizedModel, cut: Cut, pp_rank: int) -> int:
    """What torch's Adam makes for a moment: square roots of all second moments. (TE's and Apex' fused ones do not.)"""
    return 4 * num_parameters(model, cut, pp_rank) // (cut.dp_size if cut.distributed_optimizer else 1)


def _layer_bytes(spec: LlamaSpec, cut: Cut, rows: Rows, size: int) -> int:
    """Saved in one layer: two norms with the input of the linear layer after each; queries and keys before and after
    the rotation, values, attention's output and its log-sum-exp; five vectors of the feed-forward size (gate and value
    before and after the gate is split off, SwiGLU and its product)."""
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    attention = size * (3 * queries + 3 * keys) + 4 * spec.num_heads
    angles = rows.num_tokens * spec.head_dim * size
    inside = rows.total * (attention + size * 5 * spec.ffn_size) // cut.tp_size
    return 2 * _norm_bytes(spec, cut, rows.total, size) + inside + angles


def _norm_bytes(spec: LlamaSpec, cut: Cut, tokens: int, size: int) -> int:
    """The input in float32, the quotient, and the product that the next linear layer reads."""
    return tokens * ((4 + 2 * size) * spec.hidden_size + 4) // (cut.tp_size if cut.sequence_parallel else 1)


def _gathered_bytes(spec: LlamaSpec, cut: Cut, rows: Rows, precision: Precision) -> int:
    """Under sequence parallelism, a linear layer's whole input and its gradient, for as long as it runs."""
    return 2 * rows.total * spec.hidden_size * precision.dtype_bytes if cut.sequence_parallel else 0


def _has_logits(model: SizedModel, cut: Cut, pp_rank: int) -> bool:
    return model.head == "lm" and pp_rank == cut.pp_size - 1


def _vocab(model: SizedModel, cut: Cut) -> int:
    return model.spec.padded_vocab_size(cut.tp_size) // cut.tp_size
