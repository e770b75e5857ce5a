"""Bytes on one rank: weights, gradients, optimizer, activations, key-value cache, logits.

The counts follow what our own layers allocate (local layers; attention stores no scores), and tests/planning compares
them with what the engine does allocate. What they leave out is in `OVERHEAD_BYTES`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_gil.models.families import Head, ModelSpec
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
    spec: ModelSpec
    head: Head
    trained: bool
    num_groups: int = 0
    stays: bool = False
    """Though frozen it never waits on the host."""


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
    """The length of a row."""
    num_microbatches: int = 1
    num_responses: int | None = None
    """Tokens of a row that the output layer reads; None: all."""

    @property
    def total(self) -> int:
        return self.num_rows * self.num_tokens

    @property
    def num_read(self) -> int:
        return self.num_rows * (self.num_tokens if self.num_responses is None else self.num_responses)


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
        waits = offload != "none" and role != model.role and not model.stays
        return Resident(weights=held.weights if waits else 0)
    if offload not in ("rollout", "all"):
        return Resident(weights=0)
    updates = act in ("update", "step")
    steps = updates if offload == "rollout" else phase == f"step {model.role}"
    return Resident(
        weights=0,
        gradients=0 if updates and role == model.role else held.gradients,
        optimizer=0 if steps else held.optimizer,
    )


def most_saved(model: SizedModel, cut: Cut, pp_rank: int, rows: Rows, precision: Precision) -> int:
    """The most that autograd keeps at once for backward passes."""
    layers = _saved_layers(model, cut, pp_rank, rows, precision)
    return layers + max(
        _saved_end(model, cut, pp_rank, rows, precision) + _saved_logits(model, cut, pp_rank, rows, precision),
        _recomputed_layer(model, cut, rows, precision),
    )


def update_peak(model: SizedModel, cut: Cut, pp_rank: int, rows: Rows, precision: Precision) -> dict[str, int]:
    """Activations and logits at the fullest moment of a forward and backward pass: when the output layer's backward
    pass begins, or when a layer's does, by when what came behind the layers is gone."""
    layers = _saved_layers(model, cut, pp_rank, rows, precision)
    at_end = layers + _saved_end(model, cut, pp_rank, rows, precision)
    logits = _head_work(model, cut, pp_rank, rows, precision)
    inside = 2 * rows.total * model.spec.ffn_size // cut.tp_size * precision.dtype_bytes
    inside += _recomputed_layer(model, cut, rows, precision) + _gathered_bytes(model.spec, cut, rows, precision)
    if at_end + logits > layers + inside:
        return {"activations": at_end, "logits": logits}
    return {"activations": layers + inside, "logits": 0}


def forward_work(model: SizedModel, cut: Cut, pp_rank: int, rows: Rows, precision: Precision) -> int:
    """The most that a pass without gradient has at once: the inside of a layer, or a chunk of logits."""
    layer = layer_work(model.spec, cut, rows, precision)
    if model.head != "lm" or pp_rank < cut.pp_size - 1:
        return layer
    hidden = (rows.total + rows.num_read) * model.spec.hidden_size * precision.dtype_bytes  # all; those that are read
    count = min(CHUNK_ELEMENTS, rows.num_read * _vocab(model, cut))
    return max(layer, hidden + (8 + precision.dtype_bytes) * count)  # and in float32, shifted and its exponential


def _saved_layers(model: SizedModel, cut: Cut, pp_rank: int, rows: Rows, precision: Precision) -> int:
    """Of all microbatches that are under way at once."""
    spec, size = model.spec, precision.dtype_bytes
    hidden = rows.total * spec.hidden_size * size // (cut.tp_size if cut.sequence_parallel else 1)
    layer = hidden if precision.recompute == "full" else _layer_bytes(spec, cut, rows, size)
    held, passing = len(spec.layers_of(pp_rank, cut.pp_size)) * layer, 0
    if cut.pp_size > 1:  # the schedule keeps what came from the rank before and what went to the next
        held += hidden * ((pp_rank > 0) + (pp_rank < cut.pp_size - 1))
        passing = 2 * hidden  # and one gradient each way
    return held * min(cut.pp_size - pp_rank, rows.num_microbatches) + passing


def _recomputed_layer(model: SizedModel, cut: Cut, rows: Rows, precision: Precision) -> int:
    """The inside of the layer whose backward pass is under way, where it is not kept."""
    return _layer_bytes(model.spec, cut, rows, precision.dtype_bytes) if precision.recompute == "full" else 0


def _saved_end(model: SizedModel, cut: Cut, pp_rank: int, rows: Rows, precision: Precision) -> int:
    """Behind the last layer: the norm, without its product, and the hidden states that the output layer reads."""
    if pp_rank < cut.pp_size - 1:
        return 0
    spec, size = model.spec, precision.dtype_bytes
    product = rows.total * spec.hidden_size * size // (cut.tp_size if cut.sequence_parallel else 1)
    read = 0 if model.head == "score" else rows.num_read * spec.hidden_size * size
    return _norm_bytes(spec, cut, rows.total, size) - product + read


def _saved_logits(model: SizedModel, cut: Cut, pp_rank: int, rows: Rows, precision: Precision) -> int:
    """Of one microbatch; none where they are so many that the backward pass computes them again, a chunk at a time."""
    if model.head != "lm" or pp_rank < cut.pp_size - 1:
        return 0
    count = rows.num_read * _vocab(model, cut)
    return count * precision.dtype_bytes if count <= CHUNK_ELEMENTS else 0


def _head_work(model: SizedModel, cut: Cut, pp_rank: int, rows: Rows, precision: Precision) -> int:
    """Of the output layer's backward pass: logits with what is made of them, and the gradients of its weight and of the
    hidden states that it read."""
    if model.head != "lm" or pp_rank < cut.pp_size - 1:
        return 0
    size, hidden_size = precision.dtype_bytes, model.spec.hidden_size
    in_chunks = not _saved_logits(model, cut, pp_rank, rows, precision)
    weight = (4 if in_chunks else size) + (size if in_chunks and size < 4 else 0)  # summed over chunks in float32
    gradients = _vocab(model, cut) * hidden_size * weight + rows.num_read * hidden_size * size
    return _logits_work(model, cut, rows, precision) + gradients


def _logits_work(model: SizedModel, cut: Cut, rows: Rows, precision: Precision) -> int:
    """Logits, of a chunk where they are many; the same in float32, and less their peak."""
    count, size = min(CHUNK_ELEMENTS, rows.num_read * _vocab(model, cut)), precision.dtype_bytes
    return count * (8 if size == 4 else 8 + size)


def layer_work(spec: ModelSpec, cut: Cut, rows: Rows, precision: Precision) -> int:
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


def _layer_bytes(spec: ModelSpec, cut: Cut, rows: Rows, size: int) -> int:
    """Saved in one layer: two norms with the input of the linear layer after each; queries and keys before and after
    the rotation, values, attention's output and its log-sum-exp; five vectors of the feed-forward size (gate and value
    before and after the gate is split off, SwiGLU and its product). Norms of heads save what those of tokens do."""
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    attention = size * (3 * queries + 3 * keys) + 4 * spec.num_heads
    if any(weight.name == "query_norm" for weight in spec.layer_weights()):
        attention += (4 + size) * (queries + keys) + 4 * (spec.num_heads + spec.num_kv_heads)
    inside = rows.total * (attention + size * 5 * spec.ffn_size) // cut.tp_size
    return 2 * _norm_bytes(spec, cut, rows.total, size) + inside


def _norm_bytes(spec: ModelSpec, cut: Cut, tokens: int, size: int) -> int:
    """The input in float32, the quotient, and the product that the next linear layer reads."""
    return tokens * ((4 + 2 * size) * spec.hidden_size + 4) // (cut.tp_size if cut.sequence_parallel else 1)


def _gathered_bytes(spec: ModelSpec, cut: Cut, rows: Rows, precision: Precision) -> int:
    """Under sequence parallelism, a linear layer's whole input and its gradient, for as long as it runs."""
    return 2 * rows.total * spec.hidden_size * precision.dtype_bytes if cut.sequence_parallel else 0


def _vocab(model: SizedModel, cut: Cut) -> int:
    return model.spec.padded_vocab_size(cut.tp_size) // cut.tp_size
