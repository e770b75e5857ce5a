"""`bench.py rollout`: this project's sampling against `transformers.generate` on the same random weights, interleaved.

Both sides sample at temperature 1 from the whole vocabulary, in float32, in one process. In the whole rows no end can
be chosen. In the ragged ones a part of the vocabulary ends a row, so large that lengths are geometric with a third of
the limit as their mean; `generate` takes batches of as many rows as we have slots.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench_ppo import Sizes, write_inputs

from megatron_gil.config import ParallelSection, SamplingSection
from megatron_gil.engine.decoder import Decoder
from megatron_gil.engine.decoder_weights import DecoderWeights, collect_weights
from megatron_gil.engine.generation import Generator
from megatron_gil.engine.megatron import MegatronModel
from megatron_gil.models.families import ModelSpec, read_spec
from megatron_gil.parallel.layout import ParallelLayout, start_parallel, stop_parallel
from megatron_gil.types import PromptBatch

PROMPT_TOKENS = 32
BANDWIDTH_BYTES = 1 << 28
"""Of the tensor that is read to measure the memory's bandwidth: more than any cache holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    hidden_size: int
    num_layers: int
    vocab_size: int
    new_tokens: int

    def __str__(self) -> str:
        return f"{self.hidden_size} x {self.num_layers}, {self.vocab_size:,}"


SHAPES = {
    "small": Shape(hidden_size=128, num_layers=4, vocab_size=512, new_tokens=64),
    "middle": Shape(hidden_size=256, num_layers=4, vocab_size=4096, new_tokens=64),
    "large": Shape(hidden_size=768, num_layers=12, vocab_size=32000, new_tokens=24),
}
RAGGED_ROWS, RAGGED_SLOTS, RAGGED_TOKENS = 128, 32, {"small": 128, "middle": 128, "large": 48}


@dataclass(slots=True, kw_only=True)
class Case:
    """One shape and number of rows; seconds per thousand response tokens of each side, a number for each round."""

    shape: Shape
    num_rows: int
    num_slots: int
    new_tokens: int
    ragged: bool
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    ours_cpu: list[float] = field(default_factory=list)
    """Seconds on a CPU, of all threads, likewise: what another process on the machine moves less."""
    theirs_cpu: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    compiled: list[float] = field(default_factory=list)
    """The step alone, without choosing tokens, as it is and by torch.compile."""
    products: list[float] = field(default_factory=list)
    """The matrix products of a rollout alone, by the same kernels."""
    memory: list[float] = field(default_factory=list)
    """Weights and the cache's attended part read once a step, at the bandwidth measured."""
    mean_length: float = 0.0

    def ratios(self, side: Sequence[float], other: Sequence[float]) -> list[float]:
        return [a / b for a, b in zip(side, other, strict=True)]


class Ends:
    """Token ids that end a row: none that can be chosen, or so many that rows have a third of the limit's length."""

    pad_id = 0

    def __init__(self, case: Case) -> None:
        vocab_size = case.shape.vocab_size
        count = round(3 * vocab_size / case.new_tokens) if case.ragged else 0
        self.eos_ids = tuple(range(1, 1 + count)) or (vocab_size,)


def bench_rollout(
    *, rounds: int, num_threads: int, shapes: Sequence[str], rows: Sequence[int], compiled: bool, json_file: Path | None
) -> str:
    """The table; the figures of every round go to json_file."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    torch.set_num_threads(num_threads)
    layout = start_parallel(ParallelSection(), seed=1)
    cases: list[Case] = []
    with tempfile.TemporaryDirectory(prefix="bench-rollout-") as place:
        for name in shapes:
            cases += _bench_shape(Path(place) / name, name, rows, rounds, compiled, layout)
    stop_parallel()
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(case) for case in cases], indent=1))
    return format_table(cases, num_threads)


def _bench_shape(
    root: Path, name: str, rows: Sequence[int], rounds: int, compiled: bool, layout: ParallelLayout
) -> list[Case]:
    from transformers import LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    shape = SHAPES[name]
    root.mkdir()
    sizes = Sizes(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        vocab_size=shape.vocab_size,
        num_rows=1,
        prompt_tokens=PROMPT_TOKENS,
        response_tokens=shape.new_tokens,
    )
    write_inputs(root, sizes)
    theirs = LlamaForCausalLM.from_pretrained(root / "policy", dtype=torch.float32).to(layout.device).eval()  # type: ignore[arg-type]
    ours = MegatronModel(read_spec(root / "policy"), layout, head="lm", micro_size=1)
    ours.load(root / "policy")
    cases = [
        Case(shape=shape, num_rows=count, num_slots=count, new_tokens=shape.new_tokens, ragged=False) for count in rows
    ]
    ragged = RAGGED_TOKENS[name]
    cases.append(Case(shape=shape, num_rows=RAGGED_ROWS, num_slots=RAGGED_SLOTS, new_tokens=ragged, ragged=True))
    for case in cases:
        _measure(case, ours, theirs, rounds, compiled)
        print(_row(case), flush=True)
    return cases


def _measure(case: Case, model: MegatronModel, theirs: Any, rounds: int, compiled: bool) -> None:
    prompts = _prompts(case, model.layout.device)
    ends = Ends(case)
    section = SamplingSection(max_new_tokens=case.new_tokens, micro_size=case.num_slots)
    weights = collect_weights(model)
    decoder = Decoder(weights, model.spec, model.layout, num_slots=case.num_slots, num_columns=128)
    compiled_step = torch.compile(decoder.step, dynamic=False)

    def sample(seed: int) -> float:
        rollout = Generator(model, section, tokenizer=ends, seed=seed).sample(prompts)
        case.mean_length = float(rollout.response_mask.sum()) / case.num_rows
        return float(rollout.response_mask.sum())

    @torch.no_grad()
    def step_on(step: Callable[[int], torch.Tensor]) -> float:
        for _ in range(case.new_tokens):
            step(64)
        return case.num_slots * case.new_tokens

    for number in range(rounds + 1):  # the first is for warming up
        ours, ours_cpu = _per_thousand(lambda seed=number: sample(seed), model.layout)
        other, theirs_cpu = _per_thousand(lambda: _generate(theirs, prompts, case, ends), model.layout)
        found = {
            "ours": ours,
            "ours_cpu": ours_cpu,
            "theirs": other,
            "theirs_cpu": theirs_cpu,
            "products": _per_thousand(lambda: _multiply(weights, case), model.layout)[0],
            "memory": _memory_seconds(weights, model.spec, case) * 1000 / (case.num_rows * case.mean_length),
        }
        if compiled:
            found["step"] = _per_thousand(lambda: step_on(decoder.step), model.layout)[0]
            found["compiled"] = _per_thousand(lambda: step_on(compiled_step), model.layout)[0]
        if number:
            for side, seconds in found.items():
                getattr(case, side).append(seconds)


def _prompts(case: Case, device: torch.device) -> PromptBatch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.arange(case.num_rows, device=device)
    return PromptBatch(
        tokens=torch.randint(case.shape.vocab_size, (case.num_rows, PROMPT_TOKENS), generator=generator).to(device),
        lengths=torch.full_like(ids, PROMPT_TOKENS),
        row_ids=ids,
        sample_ids=ids,
        known_groups=torch.full_like(ids, -1),
    )


def _per_thousand(run: Callable[[], float], layout: ParallelLayout) -> tuple[float, float]:
    """Seconds, and seconds on a CPU, for a thousand of the tokens that `run` says it made."""
    start, cpu_start = time.perf_counter(), time.process_time()
    scale = 1000 / run()
    if layout.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * scale, (time.process_time() - cpu_start) * scale


@torch.no_grad()
def _generate(model: Any, prompts: PromptBatch, case: Case, ends: Ends) -> float:
    eos_ids = list(ends.eos_ids) if case.ragged else None
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": case.new_tokens}
    count = 0.0
    for tokens in prompts.tokens.split(case.num_slots):
        output = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), eos_token_id=eos_ids, pad_token_id=ends.pad_id, **options
        )
        response = output[:, PROMPT_TOKENS:]
        count += float((response != ends.pad_id).sum() if case.ragged else response.numel())
    return count


def _multiply(weights: DecoderWeights, case: Case) -> float:
    """Every matrix product of a rollout of `num_slots` rows: reading the prompts, then a step for each token."""

    def multiply(num_tokens: int, last: bool) -> None:
        inputs: dict[int, torch.Tensor] = {}
        for layer in weights.layers:
            for weight in (layer.qkv, layer.proj, layer.gate_up, layer.down):
                rows = inputs.setdefault(weight.shape[0], torch.ones(num_tokens, weight.shape[0]).to(weight))
                torch.mm(rows, weight)
        if last:
            torch.mm(inputs[weights.head.shape[0]], weights.head)

    multiply(case.num_slots * (PROMPT_TOKENS - 1), last=False)
    steps = case.new_tokens // 3 if case.ragged else case.new_tokens
    for _ in range(steps):
        multiply(case.num_slots, last=True)
    return case.num_slots * steps


def _memory_seconds(weights: DecoderWeights, spec: ModelSpec, case: Case) -> float:
    block = torch.ones(BANDWIDTH_BYTES // 4, device=weights.head.device)
    start = time.perf_counter()
    float(block.sum())
    bandwidth = block.nbytes / (time.perf_counter() - start)
    layers = [w for layer in weights.layers for w in (layer.qkv, layer.proj, layer.gate_up, layer.down)]
    steps = case.num_rows * case.mean_length / case.num_slots
    columns = PROMPT_TOKENS + case.mean_length / 2
    cache = 2 * spec.num_layers * case.num_slots * columns * spec.num_kv_heads * spec.head_dim * weights.head.itemsize
    return steps * (sum(w.nbytes for w in [*layers, weights.head]) + cache) / bandwidth


def format_table(cases: Sequence[Case], num_threads: int) -> str:
    lines = [
        f"float32, prompts of {PROMPT_TOKENS} tokens; {len(cases[0].ours)} interleaved rounds after one of warm-up, "
        f"median (min to max); threads: {num_threads}, CPUs: {os.cpu_count()}. Milliseconds for a token of every slot, "
        "prefill included.",
        "",
        "| hidden x layers, vocabulary | rows | new tokens | ours | transformers | ours of theirs | on a CPU, "
        "likewise | matrix products alone | memory alone | limit reached | compiled step of ours |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(_row, cases)])


def _row(case: Case) -> str:
    scale = case.num_slots  # seconds a thousand tokens are milliseconds a token
    limits = [max(pair) for pair in zip(case.products, case.memory, strict=True)]
    columns = [
        str(case.shape),
        f"{case.num_rows} through {case.num_slots}" if case.ragged else str(case.num_rows),
        f"{case.mean_length:.0f} of {case.new_tokens}" if case.ragged else str(case.new_tokens),
        f"{scale * statistics.median(case.ours):.2f}",
        f"{scale * statistics.median(case.theirs):.2f}",
        _spread(case.ratios(case.ours, case.theirs)),
        _spread(case.ratios(case.ours_cpu, case.theirs_cpu)),
        f"{scale * statistics.median(case.products):.2f}",
        f"{scale * statistics.median(case.memory):.2f}",
        f"{statistics.median(case.ratios(limits, case.ours)):.0%}",
        _spread(case.ratios(case.compiled, case.step)) if case.compiled else "",
    ]
    return f"| {' | '.join(columns)} |"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
