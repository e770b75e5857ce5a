"""`bench.py growth`: seconds a token and bytes a rank of an update as one size, recomputation or the layout grows.

Everything but what a row of the table names is as in BASE. One thread a rank. Memory is weights, gradients, optimizer
and what torch's allocator adds at an update's peak; `plan` is asked for the same.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_memory import added_bytes
from bench_turns import spread

from megatron_gil.demo.tiny_llama import llama_config
from megatron_gil.models.families import ModelSpec, spec_from_config
from megatron_gil.planning.memory import Cut, Precision, Rows, SizedModel, resident, update_peak
from megatron_gil.types import TokenBatch

_PROCESSES = multiprocessing.get_context("spawn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One row of the table: an update of a language model, all of whose rows are full."""

    rows: int = 16
    length: int = 128
    layers: int = 4
    hidden: int = 128
    vocabulary: int = 4096
    recompute: str = "none"
    layout: tuple[int, int, int] = (1, 1, 1)
    """Tensor x pipeline x data-parallel ranks."""

    @property
    def num_ranks(self) -> int:
        tp_size, pp_size, dp_size = self.layout
        return tp_size * pp_size * dp_size

    @property
    def micro_rows(self) -> int:
        return max(1, self.rows // 4)


BASE = Point()
AXES: dict[str, Sequence[Any]] = {
    "rows": (4, 16, 64),
    "length": (32, 128, 512),
    "layers": (2, 4, 8),
    "hidden": (64, 128, 256),
    "vocabulary": (512, 4096, 32768, 131072),
    "recompute": ("none", "selective", "full"),
    "layout": ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1)),
}


@dataclass(slots=True, kw_only=True)
class Found:
    """Of a point, one rank."""

    seconds: list[float] = field(default_factory=list)  # of an update
    cpu_seconds: list[float] = field(default_factory=list)
    measured_bytes: int = 0
    planned_bytes: int = 0


def points(axes: Sequence[str]) -> list[tuple[str, Point]]:
    """(axis, point)."""
    return [(axis, replace(BASE, **{axis: value})) for axis in axes for value in AXES[axis]]


def bench_growth(*, rounds: int, axes: Sequence[str], json_file: Path | None) -> str:
    """The table; the figures go to json_file."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    wanted = points(axes)
    unique = list(dict.fromkeys(point for _, point in wanted))
    found: dict[Point, list[Found]] = {}
    for layout in dict.fromkeys(point.layout for point in unique):
        own = [point for point in unique if point.layout == layout]
        ranks = _run_ranks(own[0].num_ranks, own, rounds)
        found |= {point: [rank[i] for rank in ranks] for i, point in enumerate(own)}
    if json_file is not None:
        figures = [{"point": asdict(p), "ranks": [asdict(rank) for rank in ranks]} for p, ranks in found.items()]
        json_file.write_text(json.dumps(figures, indent=1))
    return format_table(wanted, found, rounds)


def _run_ranks(num_ranks: int, own: Sequence[Point], rounds: int) -> list[list[Found]]:
    """What each rank found, as many processes as the layout has ranks."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, processes = [], []
    for rank in range(num_ranks):
        mine, its = _PROCESSES.Pipe(duplex=False)
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is there
        }
        process = _PROCESSES.Process(target=_rank, args=(its, environment, own, rounds), daemon=True)
        process.start()
        its.close()
        pipes.append(mine)
        processes.append(process)
    try:
        return [pipe.recv() for pipe in pipes]
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()


def _rank(pipe: Any, environment: dict[str, str], own: Sequence[Point], rounds: int) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    from megatron_gil.config import ParallelSection
    from megatron_gil.parallel.layout import start_parallel, stop_parallel

    tp_size, pp_size, _ = own[0].layout
    layout = start_parallel(ParallelSection(tensor_size=tp_size, pipeline_size=pp_size), seed=1)
    runs = [_Run(point, layout) for point in own]
    for number in range(rounds + 1):
        for run in runs:
            run.step(is_warm=number > 0)
    pipe.send([run.measure() for run in runs])
    pipe.close()
    stop_parallel()


class _Run:
    """A model with its optimizer and rows, on this rank."""

    def __init__(self, point: Point, layout: Any) -> None:
        from megatron_gil import config as c
        from megatron_gil.engine.megatron import TrainableModel
        from megatron_gil.engine.protocol import Part
        from megatron_gil.training.supervised.objectives import sft_loss

        self.spec, self.point, self.layout = _spec(point), point, layout
        self.model = TrainableModel(
            self.spec,
            layout,
            head="lm",
            micro_size=point.micro_rows // layout.dp_size,
            models=c.ModelsSection(recompute=point.recompute),  # type: ignore[arg-type]
            optimizer=c.OptimizerSection(),
        )
        assert self.model.optimizer is not None
        torch.manual_seed(layout.rank)
        for parameter in self.model.module.parameters():
            torch.nn.init.normal_(parameter.data, std=0.02)
        self.model.optimizer.reload_master_weights()
        self.part = Part(batch=_rows(point, layout.dp_size), loss_fn=sft_loss)
        self.found = Found()

    def step(self, *, is_warm: bool) -> None:
        start, cpu_start = time.perf_counter(), time.process_time()
        self.model.update(self.part, lr=1e-5)
        if is_warm:
            self.found.seconds.append(time.perf_counter() - start)
            self.found.cpu_seconds.append(time.process_time() - cpu_start)

    def measure(self) -> Found:
        buffers: Any = self.model.ddp.buffers  # megatron-core's, not those of torch.nn.Module
        assert self.model.optimizer is not None
        held = sum(parameter.nbytes for parameter in self.model.module.parameters())
        held += sum(buffer.grad_data.nbytes for buffer in buffers)
        states = [fragment.state for fragment in self.model.optimizer.fragments() if fragment.state is not None]
        held += sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq"))
        self.found.measured_bytes = held + added_bytes(lambda: self.model.accumulate(self.part))
        self.found.planned_bytes = planned_bytes(self.point, self.layout.pp_rank)
        return self.found


def _spec(point: Point) -> ModelSpec:
    config = llama_config(
        vocab_size=point.vocabulary,
        hidden_size=point.hidden,
        ffn_size=3 * point.hidden,
        num_layers=point.layers,
    )
    return spec_from_config(config | {"max_position_embeddings": point.length}, source="the bench's config")


def planned_bytes(point: Point, pp_rank: int) -> int:
    """What `plan` says of the point's update on a rank, without its overhead."""
    tp_size, pp_size, dp_size = point.layout
    model = SizedModel(role="policy", spec=_spec(point), head="lm", trained=True)
    cut = Cut(tp_size=tp_size, pp_size=pp_size, dp_size=dp_size)
    precision = Precision(dtype_bytes=4, recompute=point.recompute)
    rows = Rows(
        num_rows=point.micro_rows // dp_size,
        num_tokens=point.length,
        num_microbatches=4,
        num_responses=point.length - point.length // 4,
    )
    return resident(model, cut, pp_rank, precision).total + sum(
        update_peak(model, cut, pp_rank, rows, precision).values()
    )


def _rows(point: Point, dp_size: int) -> TokenBatch:
    """This rank's: a quarter of each is prompt."""
    count = point.rows // dp_size
    column = torch.arange(point.length - 1)
    return TokenBatch(
        tokens=torch.randint(1, point.vocabulary, (count, point.length)),
        lengths=torch.full((count,), point.length),
        response_mask=(column >= point.length // 4 - 1).expand(count, -1),
        row_ids=torch.arange(count),
    )


def format_table(wanted: Sequence[tuple[str, Point]], found: dict[Point, list[Found]], rounds: int) -> str:
    base = ", ".join(f"{name} {value}" for name, value in asdict(BASE).items() if name != "layout")
    lines = [
        "An update of a language model in float32 on full rows, a quarter of each prompt, four microbatches; one "
        f"thread a rank; {rounds} interleaved rounds after one of warm-up, median (min to max); CPUs: "
        f"{os.cpu_count()}. Where not said otherwise: {base}.",
        "",
        "| | microseconds a token | of the first of its kind | on CPUs, all ranks | MiB of the fullest rank | plan |",
        "|---" * 6 + "|",
    ]
    firsts: dict[str, Point] = {}
    for axis, point in wanted:
        first = found[firsts.setdefault(axis, point)]
        lines.append(_row(axis, point, found[point], first, firsts[axis]))
    return "\n".join(lines)


def _row(axis: str, point: Point, ranks: Sequence[Found], first: Sequence[Found], first_point: Point) -> str:
    value = getattr(point, axis)
    name = f"{axis} {' x '.join(map(str, value)) if axis == 'layout' else value}"
    own, other = (_per_token(p, r, "seconds") for p, r in ((point, ranks), (first_point, first)))
    fullest = max(ranks, key=lambda rank: rank.measured_bytes)
    columns = [
        name,
        spread(own, 1),
        f"{statistics.median(a / b for a, b in zip(own, other, strict=True)):.2f}",
        f"{statistics.median(_per_token(point, ranks, 'cpu_seconds')):.1f}",
        f"{fullest.measured_bytes / 2**20:.1f}",
        f"{fullest.planned_bytes / fullest.measured_bytes - 1:+.1%}",
    ]
    return f"| {' | '.join(columns)} |"


def _per_token(point: Point, ranks: Sequence[Found], which: str) -> list[float]:
    """Microseconds of each round: the slowest rank's, or seconds on a CPU of all ranks together."""
    combine = sum if which == "cpu_seconds" else max
    rounds = zip(*(getattr(rank, which) for rank in ranks), strict=True)
    return [1e6 * combine(seconds) / (point.rows * point.length) for seconds in rounds]
