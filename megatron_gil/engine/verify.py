"""The logits of a checkpoint's model, under any layout, against transformers' on the Hugging Face directory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_gil.config import ConfigError, ParallelSection
from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.engine.megatron import MegatronModel
from megatron_gil.models.convert.copy import ModelDirectory
from megatron_gil.models.convert.locate import Role, find_model
from megatron_gil.models.families import check_layout
from megatron_gil.models.heads import output_weight
from megatron_gil.parallel.collectives import broadcast_object, concat_over_tp
from megatron_gil.parallel.layout import ParallelLayout, start_parallel, stop_parallel
from megatron_gil.parallel.pipeline import (
    receive_from_previous_pp_stage,
    send_to_next_pp_stage,
    share_from_last_pp_stage,
)

TEXTS = (
    "Once upon a time, there was a little girl who lived near a forest.",
    "\n\nHuman: How do I bake bread at home?\n\nAssistant: Mix flour, water, salt and yeast, and let it rise.",
    "def add(a, b):\n    return a + b  # 2 + 3 == 5",
    "Zu Fuß über die Brücke: €3,50. Где библиотека? 図書館はどこですか。",
)
NUM_RANDOM_ROWS = 4
MAX_ROW_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Over all positions of all rows and, for a language model, all tokens of the vocabulary."""

    num_positions: int
    largest_logit: float
    max_difference: float
    mean_difference: float
    top1_agreement: float

    def __str__(self) -> str:
        return (
            f"{self.num_positions} positions, largest |logit| {self.largest_logit:.4g}: difference max "
            f"{self.max_difference:.3g}, mean {self.mean_difference:.3g}; top-1 agreement {self.top1_agreement:.2%}"
        )


def verify(
    hf_dir: Path,
    ckpt_dir: Path,
    *,
    role: Role | None,
    tolerance: float,
    prompts: Sequence[str] | None,
    tensor_size: int,
    pipeline_size: int,
    allow_bin: bool,
    note: Callable[[str], None],
) -> int:
    """Prints the comparison on rank 0; 1 on every rank where the largest difference is above the tolerance, else 0."""
    theirs = ModelDirectory.read(hf_dir, allow_bin=allow_bin)
    ours = ModelDirectory.read(find_model(ckpt_dir, role, note), role=role)
    if (theirs.head, theirs.spec.vocab_size) != (ours.head, ours.spec.vocab_size):
        raise ConfigError(f"{hf_dir} and {ours.path} are models of different heads or vocabularies")
    check_layout(ours.spec, tensor_size, pipeline_size, sequence_parallel=False)
    layout = start_parallel(ParallelSection(tensor_size=tensor_size, pipeline_size=pipeline_size), seed=1)
    try:
        rows = sample_rows(Tokenizer.read(ours.path), prompts or TEXTS, ours)
        comparison = compare(theirs, ours, rows, layout)
        comparison = broadcast_object(comparison, layout)
    finally:
        stop_parallel()
    within = comparison.max_difference <= tolerance
    if layout.is_main:
        print(f"{comparison}; tolerance {tolerance:g}: {'ok' if within else 'EXCEEDED'}")
        sys.stdout.flush()
    return 0 if within else 1


def sample_rows(tokenizer: Tokenizer, texts: Sequence[str], model: ModelDirectory) -> list[Tensor]:
    """Rows [T] of token ids: the texts, and random ids from the whole vocabulary."""
    width = min(MAX_ROW_TOKENS, model.spec.max_positions)
    rows = [torch.tensor(tokenizer.encode(text, bos=True)[:width]) for text in texts]
    generator = torch.Generator().manual_seed(1)
    shape = (NUM_RANDOM_ROWS, width)
    return [*rows, *torch.randint(model.spec.vocab_size, shape, generator=generator)]


@torch.no_grad()
def compare(
    theirs: ModelDirectory, ours: ModelDirectory, rows: Sequence[Tensor], layout: ParallelLayout
) -> Comparison | None:
    """Both sides in float32, one after the other, so that one model is in memory at a time. None but on rank 0."""
    expected = _their_outputs(theirs, rows, layout.device) if layout.is_main else []
    model = MegatronModel(ours.spec, layout, head=ours.head, micro_size=1, dtype=torch.float32)
    model.load(ours.path)
    found = [_our_output(model, row.to(layout.device)) for row in rows]
    if not layout.is_main:
        return None
    differences = [(one.double() - other.double()).abs() for one, other in zip(found, expected, strict=True)]
    pairs = zip(found, expected, strict=True)
    agreed = [one.argmax(-1) == other.argmax(-1) for one, other in pairs]
    return Comparison(
        num_positions=sum(len(row) for row in rows),
        largest_logit=max(float(output.abs().max()) for output in expected),
        max_difference=float(torch.stack([d.max() for d in differences]).max()),  # a NaN stays one
        mean_difference=float(torch.cat([d.flatten() for d in differences]).mean()),
        top1_agreement=float(torch.cat(agreed).double().mean()),
    )


def _their_outputs(directory: ModelDirectory, rows: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """[T, V] logits, or [T, 1] scores, of each row."""
    import transformers
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    kind: Any = getattr(transformers, directory.spec.architectures()[directory.head])
    is_safe = any(path.path.suffix == ".safetensors" for path in directory.files)
    model = kind.from_pretrained(directory.path, dtype=torch.float32, use_safetensors=is_safe, local_files_only=True)
    model = model.to(device).eval()
    readout = model.score if directory.head == "score" else model.lm_head
    return [readout(model.model(row[None].to(device)).last_hidden_state)[0] for row in rows]


def _our_output(model: MegatronModel, row: Tensor) -> Tensor:
    """The same of our side, on every rank."""
    layout, tokens = model.layout, row[None]
    model.module.eval()
    hidden = receive_from_previous_pp_stage((len(row), 1, model.spec.hidden_size), model.dtype, layout)
    model.module.set_input_tensor(hidden)  # type: ignore[arg-type]  None on the first stage
    places = torch.arange(len(row), device=row.device)[None]
    output: Any = model.module(tokens, tokens, places)
    width = model.spec.vocab_size if model.head == "lm" else 1
    logits = None
    if layout.is_last_pp_stage:
        logits = _logits(model, output[0])[:, :width].contiguous()  # without what pads the vocabulary
    else:
        send_to_next_pp_stage(output, layout)
    return share_from_last_pp_stage(logits, (len(row), width), model.dtype, layout)


def _logits(model: MegatronModel, hidden: Tensor) -> Tensor:
    """[T, H] -> [T, V] of the padded vocabulary, or [T, 1] scores."""
    if model.head == "lm":
        return concat_over_tp(hidden @ output_weight(model.module).T, -1, model.layout)
    return model.module.output_layer.score(hidden)  # type: ignore[operator,union-attr]
