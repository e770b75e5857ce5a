"""`bench.py train --parts logprobs`: log-probs with gradient at a vocabulary of 128,256, from hidden states on.

Three ways to the same numbers, in turns on the same rows: ours, the output layer on response positions alone, in
chunks; ours at an earlier commit, on the logits of all positions; and `log_softmax(logits).gather` on all positions.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from bench_memory import peak_bytes
from bench_rows import Lengths, draw_batches
from bench_turns import Side, Turns, ratios, spread, take_turns
from torch import Tensor

EARLIER = "8bec094"
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    vocab_size: int = 128_256
    hidden_size: int = 256
    num_rows: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """Rows padded to the longest."""

    hidden: Tensor  # [R, T, H], with gradient
    weight: Tensor  # [V, H], with gradient
    targets: Tensor  # [R, T]: the next token
    is_response: Tensor  # [R, T] bool: the next token is one of the response
    tp_pg: Any


def _ours(at: Positions) -> Tensor:
    from megatron_gil.parallel.vocab import vocab_parallel_log_probs

    places = at.is_response.flatten().nonzero().squeeze(1)
    return vocab_parallel_log_probs(
        at.hidden.flatten(0, 1)[places],
        at.weight,
        at.targets.flatten()[places],
        at.tp_pg,
        vocab_size=len(at.weight),
        temperature=1.0,
    )


def _earlier(at: Positions) -> Tensor:
    found = _earlier_module().vocab_parallel_log_probs(
        at.hidden @ at.weight.T, at.targets, at.tp_pg, vocab_size=len(at.weight)
    )
    return found[at.is_response]


def _log_softmax(at: Positions) -> Tensor:
    log_probs = torch.log_softmax(at.hidden @ at.weight.T, dim=-1)
    return log_probs.gather(-1, at.targets[..., None]).squeeze(-1)[at.is_response]


WAYS: dict[str, Callable[[Positions], Tensor]] = {
    "ours": _ours,
    f"ours at {EARLIER}": _earlier,
    "log_softmax(logits).gather": _log_softmax,
}


def _earlier_module() -> ModuleType:
    """parallel/vocab.py of that commit, from git."""
    name = "megatron_gil/parallel/vocab.py"
    source = subprocess.run(["git", "show", f"{EARLIER}:{name}"], cwd=ROOT, check=True, capture_output=True, text=True)
    module = ModuleType("earlier_vocab")
    exec(compile(source.stdout, f"{EARLIER}:{name}", "exec"), module.__dict__)
    return module


def run_way(turns: Turns, way: str, lengths: Lengths, sizes: Sizes, num_steps: int) -> None:
    from megatron_gil.config import ParallelSection
    from megatron_gil.parallel.layout import start_parallel

    at = _positions(lengths, sizes, start_parallel(ParallelSection(), seed=1).tp_pg)
    sums: list[float] = []

    def step() -> None:
        at.hidden.grad = at.weight.grad = None
        loss = -WAYS[way](at).sum()
        loss.backward()
        sums.append(float(loss.detach()))

    asked = False
    for _ in range(num_steps):
        if asked:
            at.hidden.grad = at.weight.grad = None
            peak = peak_bytes(step)
            turns.wait({"peak_bytes": peak, "loss": sums[-1]})
            return
        step()
        assert at.weight.grad is not None
        asked = turns.wait({"loss": sums[-1], "gradient": float(at.weight.grad.norm())})


def _positions(lengths: Lengths, sizes: Sizes, tp_pg: Any) -> Positions:
    [rows] = draw_batches(1, sizes.num_rows, vocab_size=sizes.vocab_size, lengths=lengths)
    prompts = torch.tensor([len(row.prompt) for row in rows])
    ends = prompts + torch.tensor([len(row.chosen) + 1 for row in rows])
    column = torch.arange(int(ends.max()))
    torch.manual_seed(1)
    shape = (sizes.num_rows, len(column))
    return Positions(
        hidden=torch.randn(*shape, sizes.hidden_size).requires_grad_(),
        weight=(0.05 * torch.randn(sizes.vocab_size, sizes.hidden_size)).requires_grad_(),
        targets=torch.randint(sizes.vocab_size, shape),
        is_response=(column >= prompts[:, None] - 1) & (column < ends[:, None] - 1),
        tp_pg=tp_pg,
    )


@dataclass(slots=True, kw_only=True)
class Case:
    lengths: Lengths
    num_positions: int
    num_responses: int
    sides: list[Side] = field(repr=False)


def bench_logprobs(*, rounds: int, num_threads: int, sizes: Sizes | None = None) -> str:
    """The table. The ways must agree: loss to 1e-5 and norm of the gradient to 1e-4, relative."""
    sizes = sizes or Sizes()
    cases = []
    kinds: tuple[Lengths, Lengths] = ("full", "chat")
    for lengths in kinds:
        at = _positions(lengths, sizes, None)
        sides = [Side(way, run_way, (way, lengths, sizes)) for way in WAYS]
        take_turns(sides, rounds=rounds, num_threads=num_threads, memory=True)
        for note, tolerance in (("loss", 1e-5), ("gradient", 1e-4)):
            first, *others = (side.steps[0].notes[note] for side in sides)
            assert all(abs(other - first) <= tolerance * abs(first) for other in others), (note, first, others)
        num_responses = int(at.is_response.sum())
        cases.append(Case(lengths=lengths, num_positions=at.targets.numel(), num_responses=num_responses, sides=sides))
    return format_table(cases, sizes, rounds, num_threads)


def format_table(cases: Sequence[Case], sizes: Sizes, rounds: int, num_threads: int) -> str:
    lines = [
        f"Log-probs with gradient at vocabulary {sizes.vocab_size:,}, hidden {sizes.hidden_size}, float32; {rounds} "
        f"interleaved rounds, median (min to max); threads of each: {num_threads}. Peak: hidden states, weight and "
        "their gradients included.",
        "",
        "| lengths | positions, of responses | | seconds | ours of it | on a CPU, likewise | peak, MiB | ours of it |",
        "|---" * 8 + "|",
    ]
    for case in cases:
        ours = case.sides[0]
        for side in case.sides:
            assert ours.measured is not None
            assert side.measured is not None
            mine, other = ours.measured.notes["peak_bytes"], side.measured.notes["peak_bytes"]
            columns = [
                case.lengths,
                f"{case.num_positions:,}, {case.num_responses:,}",
                side.name,
                spread(side.seconds),
                spread(ratios(ours.seconds, side.seconds)),
                spread(ratios(ours.cpu_seconds, side.cpu_seconds)),
                f"{other / 2**20:,.0f}",
                f"{mine / other:.2f}",
            ]
            lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)
