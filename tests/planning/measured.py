"""What the engine really allocates on a rank, in bytes: counted from its tensors, or from torch's record of every
allocation."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from bench_memory import added_bytes

from megatron_gil import config as c
from megatron_gil.engine.decoder import Decoder
from megatron_gil.engine.decoder_weights import collect_weights
from megatron_gil.engine.generation import num_columns
from megatron_gil.engine.megatron import TrainableModel
from megatron_gil.engine.protocol import Part
from megatron_gil.models.families import FAMILIES, LlamaSpec, ModelSpec
from megatron_gil.parallel import vocab
from megatron_gil.training.supervised.objectives import sft_loss
from megatron_gil.types import LossSum, Readout, TokenBatch
from tests.training.running import parallel

SPEC = LlamaSpec(
    hidden_size=128,
    ffn_size=344,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    vocab_size=1001,  # padded under tensor parallelism
    max_positions=256,
    norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    tied=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=3,
)


def spec_of(settings: dict[str, Any]) -> ModelSpec:
    """The same sizes in the case's family."""
    return FAMILIES[settings.get("family", "llama")](
        **{field.name: getattr(SPEC, field.name) for field in fields(SPEC)}
    )


ROWS, TOKENS, MICROBATCHES = 4, 64, 3
PROMPT_TOKENS, NEW_TOKENS = 12, 20


def measure(layout: dict[str, Any], head: Any, settings: dict[str, Any]) -> dict[str, int]:
    """On one rank, bytes of each part and the most that autograd holds. Where no other rank's pace moves it, also what
    an update and a pass without gradient add at their peaks."""
    vocab._CHUNK_ELEMENTS = settings.get("chunk_elements", vocab._CHUNK_ELEMENTS)  # of this process alone
    with parallel(layout) as started:
        torch.manual_seed(started.rank)
        model = TrainableModel(
            spec_of(settings),
            started,
            head=head,
            num_groups=2 if head == "critic" else 0,
            micro_size=ROWS,
            models=c.ModelsSection(dtype=settings["dtype"], recompute=settings.get("recompute", "none")),
            optimizer=c.OptimizerSection(),
            distributed_optimizer=settings.get("distributed_optimizer", False),
        )
        for parameter in model.module.parameters():
            torch.nn.init.normal_(parameter.data, std=0.02)
        assert model.optimizer is not None
        model.optimizer.reload_master_weights()
        batch = _rows(ROWS * MICROBATCHES)
        part = Part(batch=batch, loss_fn=sft_loss if head == "lm" else _value_loss)
        model.update(part, lr=1e-4)  # the first one also makes Adam's state
        buffers: Any = model.ddp.buffers  # megatron-core's, not those of torch.nn.Module
        found = {
            "weights": sum(p.nbytes for p in model.module.parameters()),
            "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
            "optimizer": _optimizer_bytes(model),
            "saved": most_saved(model, lambda: model.accumulate(part)),
        }
        if started.tp_size == started.pp_size == 1:
            found["update"] = added_bytes(lambda: model.accumulate(part))
            found["score"] = added_bytes(lambda: model.evaluate(batch, entropy=head == "lm"))
        if head == "lm":
            found |= _decoder_bytes(model)
        return found


def most_saved(model: TrainableModel, run: Callable[[], Any]) -> int:
    """The most that autograd holds for backward passes at once, each piece of memory counted once; without the weights
    themselves."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.module.parameters()}
    holders: Counter[tuple[int, int]] = Counter()
    top = 0

    class Held:
        """Counts a saved tensor for as long as autograd keeps it."""

        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal top
            storage = tensor.untyped_storage()
            self.tensor, self.key = tensor, (storage.data_ptr(), storage.nbytes())
            holders[self.key] += 1
            top = max(top, sum(size for address, size in +holders if address not in own))

        def __del__(self) -> None:
            holders[self.key] -= 1

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        run()
    return top


def _rows(count: int) -> TokenBatch:
    return TokenBatch(
        tokens=torch.randint(4, SPEC.vocab_size, (count, TOKENS)),
        lengths=torch.full((count,), TOKENS),
        response_mask=torch.ones(count, TOKENS - 1, dtype=torch.bool),
        row_ids=torch.arange(count),
    )


def _value_loss(readout: Readout, rows: TokenBatch) -> LossSum:
    total = readout.values.square().sum()
    return LossSum(total=total, metrics={})


def _optimizer_bytes(model: TrainableModel) -> int:
    assert model.optimizer is not None
    parts = 0
    for fragment in model.optimizer.fragments():
        if fragment.state is not None:
            parts += sum(fragment.state[key].nbytes for key in ("exp_avg", "exp_avg_sq"))
            parts += fragment.main.nbytes if fragment.main is not None else 0
    return parts


def _decoder_bytes(model: TrainableModel) -> dict[str, int]:
    """Of the keys and values of every slot, and of the weights that this rank has of other pipeline ranks."""
    weights = collect_weights(model)
    decoder = Decoder(
        weights, model.spec, model.layout, num_slots=ROWS, num_columns=num_columns(PROMPT_TOKENS, NEW_TOKENS)
    )
    own = {parameter.data_ptr() for parameter in model.module.parameters()}
    parts = [weights.embedding, weights.final_norm, weights.head]
    parts += [part for layer in weights.layers for f in fields(layer) if (part := getattr(layer, f.name)) is not None]
    received = {part.data_ptr(): part.nbytes for part in parts if part.data_ptr() not in own}
    return {"cache": decoder.cache.nbytes, "received": sum(received.values())}
