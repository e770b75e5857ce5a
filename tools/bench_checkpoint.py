"""`bench.py checkpoint`: what saving costs each rank, measured on gloo processes and modelled for 70B on 1,024 GPUs."""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
CUTS = {1: (1, 1), 2: (1, 1), 4: (2, 1), 8: (2, 2)}
"""Processes -> (tensor-, pipeline-parallel); the rest is data-parallel."""
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 8000,
    "rope_theta": 10000.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LARGE = {"preset": "70b", "tp_size": 8, "pp_size": 8, "dp_size": 16}
DISK_BYTES_PER_S = 1e9
"""Of one rank, all ranks at once: an assumption, 8 GB/s for a host of 8 GPUs."""
GIB, MIB = 1 << 30, 1 << 20


@dataclass(slots=True)
class Traffic:
    """Bytes through one rank while it saves."""

    seconds: float = 0.0
    written: int = 0
    received: int = 0
    """Into the tensors that collectives fill."""
    largest: int = 0
    """Of these tensors."""


@dataclass(frozen=True, slots=True)
class Case:
    tree: Path
    world: int
    rounds: list[Traffic] = field(default_factory=list)
    """Of each save the most of any rank."""


def bench_checkpoint(*, rounds: int, against: Path | None, directory: Path | None) -> str:
    """The tables. against: another checkout, whose saves take turns with ours."""
    trees = [ROOT, *([against.resolve()] if against else [])]
    cases = [Case(tree, world) for world in CUTS for tree in trees]
    with tempfile.TemporaryDirectory(dir=directory, prefix="bench-checkpoint-") as place:
        root = Path(place)
        _write_tokenizer(root / "tokenizer")
        for number in range(rounds):
            for case in cases:
                case.rounds.append(_run(case, root / f"{number}-{case.tree.name}-{case.world}", root / "tokenizer"))
                print(f"{case.tree.name}, {case.world} processes: {case.rounds[-1]}", file=sys.stderr)
    return "\n".join([*_table(cases, trees), "", *_large_table()])


def _write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models

    directory.mkdir()
    words = {word: i for i, word in enumerate(("<s>", "</s>", "<unk>", "a"))}
    Tokenizer(models.WordLevel(words, unk_token="<unk>")).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (directory / "config.json").write_text(json.dumps(CONFIG))


def _run(case: Case, directory: Path, tokenizer: Path) -> Traffic:
    """One save by all ranks, each a process that imports the package from the case's tree."""
    directory.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(case.world):
        environment = os.environ | {
            "PYTHONPATH": str(case.tree),
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(case.world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        command = [sys.executable, __file__, str(directory), str(tokenizer)]
        ranks.append(subprocess.Popen(command, cwd=directory, env=environment, stderr=subprocess.PIPE, text=True))
    said = [rank.communicate()[1] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError("\n".join(said))
    found = [Traffic(**json.loads(path.read_text())) for path in sorted(directory.glob("rank*.json"))]
    subprocess.run(["rm", "-r", str(directory)], check=True)
    return Traffic(*(max(getattr(t, name) for t in found) for name in ("seconds", "written", "received", "largest")))


def _table(cases: Sequence[Case], trees: Sequence[Path]) -> list[str]:
    lines = [
        f"{len(cases[0].rounds)} interleaved saves, median (min to max) of the slowest rank; MiB of the rank with the "
        f"most; {os.cpu_count()} CPUs, load {os.getloadavg()[1]:.1f} in the last 5 minutes.",
        "",
        "| processes (tensor x pipeline x data) | tree | seconds | written | received | largest tensor received |",
        "|---|---|---|---|---|---|",
    ]
    for case in cases:
        tp_size, pp_size = CUTS[case.world]
        seconds, last = [traffic.seconds for traffic in case.rounds], case.rounds[-1]
        spread = f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
        counts = " | ".join(f"{count / MIB:.1f}" for count in (last.written, last.received, last.largest))
        cut = f"{case.world} ({tp_size} x {pp_size} x {case.world // tp_size // pp_size})"
        lines.append(f"| {cut} | {'here' if case.tree == trees[0] else case.tree.name} | {spread} | {counts} |")
    return lines


def _large_table() -> list[str]:
    """The same, counted from the table of weights; before: what was done until commit 8bec094."""
    cut = f"{LARGE['tp_size']} x {LARGE['pp_size']} x {LARGE['dp_size']}"
    lines = [
        f"Modelled: Llama {LARGE['preset']} in bfloat16 on {cut}, optimizer sharded; the rank with the most; "
        f"{DISK_BYTES_PER_S / 1e9:.0f} GB/s to disk for each rank is assumed.",
        "",
        "| | written, GiB | received, GiB | largest tensor received, GiB | seconds to write |",
        "|---|---|---|---|---|",
    ]
    for name, traffic in (("before", _large_before()), ("now", _large_now())):
        counts = " | ".join(f"{count / GIB:.2f}" for count in (traffic.written, traffic.received, traffic.largest))
        lines.append(f"| {name} | {counts} | {traffic.written / DISK_BYTES_PER_S:.1f} |")
    return lines


def _pipeline_ranks() -> list[list[tuple[int, list[tuple[str, int]]]]]:
    """Of each pipeline rank its parameters: (elements on a tensor-parallel rank, Hugging Face's name and elements)."""
    from megatron_gil.planning.presets import SPECS

    spec, tp_size, pp_size = SPECS[LARGE["preset"]], LARGE["tp_size"], LARGE["pp_size"]
    table, found = spec.weights("lm"), []
    for pp_rank in range(pp_size):
        layers = spec.layers_of(pp_rank, pp_size)
        held = [(weight, 0) for weight in table.first * (pp_rank == 0)]
        held += [(weight, layer) for layer in layers for weight in table.layer]
        held += [(weight, 0) for weight in table.last * (pp_rank == pp_size - 1)]
        parameters = []
        for weight, layer in held:
            parts = [(part.name.format(layer=layer), _count(part.shape)) for part in weight.parts]
            parameters.append((weight.num_elements(tp_size), parts))
        found.append(parameters)
    return found


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _large_before() -> Traffic:
    """One rank after the other wrote a whole parameter, 2 + 12 bytes an element. The tensor-parallel ranks beside it
    got it whole; Adam's three numbers were summed over all data-parallel ranks first."""
    tp_size, dp_size, worst = LARGE["tp_size"], LARGE["dp_size"], Traffic()
    for parameters in _pipeline_ranks():
        written, received = Counter[int](), Counter[int]()
        everywhere = sum(12 * local for local, _ in parameters)
        for order, (_, parts) in enumerate(parameters):
            owner, whole = order % (dp_size * tp_size), 14 * sum(count for _, count in parts)
            written[owner] += whole
            received[owner // tp_size] += whole
            worst.largest = max(worst.largest, *(4 * count for _, count in parts))
        worst.written = max(worst.written, *written.values())
        worst.received = max(worst.received, everywhere + max(received.values()))
    return worst


def _large_now() -> Traffic:
    from megatron_gil.engine.model_files import choose_writers

    tp_size, dp_size, worst = LARGE["tp_size"], LARGE["dp_size"], Traffic()
    for parameters in _pipeline_ranks():
        sizes = {name: 2 * count for _, parts in parameters for name, count in parts}
        weights = Counter[tuple[int, int]]()
        for name, writer in choose_writers(sizes, dp_size=dp_size, tp_size=tp_size).items():
            weights[writer] += sizes[name]
        state = sum(12 * local for local, _ in parameters) // dp_size
        worst.written = max(worst.written, state + max(weights.values()))
        worst.received = max(worst.received, *weights.values())
        worst.largest = max(worst.largest, *sizes.values())
    return worst


def _save(directory: Path, tokenizer: Path) -> None:
    """One rank: save once so that the optimizer has a state, then once more and count. Runs in either tree."""
    import torch
    import torch.distributed as dist

    from megatron_gil.config import CheckpointSection, OptimizerSection, ParallelSection
    from megatron_gil.engine.checkpoint import CheckpointStore
    from megatron_gil.engine.files import FileWriter
    from megatron_gil.engine.megatron import TrainableModel
    from megatron_gil.models.families import spec_from_config
    from megatron_gil.parallel.collectives import barrier
    from megatron_gil.parallel.layout import start_parallel, stop_parallel

    torch.set_num_threads(1)
    tp_size, pp_size = CUTS[int(os.environ["WORLD_SIZE"])]
    layout = start_parallel(ParallelSection(tensor_size=tp_size, pipeline_size=pp_size, timeout_s=600.0), seed=1)
    model = TrainableModel(
        spec_from_config(CONFIG, source="bench"),
        layout,
        head="lm",
        micro_size=1,
        dtype=torch.bfloat16,
        optimizer=OptimizerSection(),
        distributed_optimizer=layout.dp_size > 1,
    )
    section = CheckpointSection(background=False, keep_last=1)
    store = CheckpointStore(directory / "checkpoints", layout, section, tokenizer_dir=tokenizer)
    store.save(1, {"policy": model}, {})
    traffic, writers = Traffic(), list[FileWriter]()
    start, all_gather, gather, all_reduce = FileWriter.start, dist.all_gather, dist.gather, dist.all_reduce

    def count(tensors: Sequence[torch.Tensor]) -> None:
        size = sum(tensor.nbytes for tensor in tensors)
        traffic.received += size
        traffic.largest = max(traffic.largest, size)

    def note_start(files: FileWriter) -> None:
        writers.append(files)
        start(files)

    def counted_all_gather(parts: Any, tensor: Any, **options: Any) -> Any:
        count(parts)
        return all_gather(parts, tensor, **options)

    def counted_gather(tensor: Any, parts: Any = None, **options: Any) -> Any:
        count(parts or [])
        return gather(tensor, parts, **options)

    def counted_all_reduce(tensor: Any, *rest: Any, **options: Any) -> Any:
        if tensor.ndim:  # not what ranks agree on
            count([tensor])
        return all_reduce(tensor, *rest, **options)

    os.sync()
    barrier(layout)
    with (
        patch.object(FileWriter, "start", note_start),
        patch.object(dist, "all_gather", counted_all_gather),
        patch.object(dist, "gather", counted_gather),
        patch.object(dist, "all_reduce", counted_all_reduce),
    ):
        began = time.perf_counter()
        store.save(2, {"policy": model}, {})
        traffic.seconds = time.perf_counter() - began
    traffic.written = sum(entry["size"] for files in writers for entry in files.entries.values())
    text = json.dumps({name: getattr(traffic, name) for name in ("seconds", "written", "received", "largest")})
    (directory / f"rank{layout.rank}.json").write_text(text)
    stop_parallel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One rank of `bench.py checkpoint`.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("tokenizer", type=Path)
    given = parser.parse_args()
    _save(given.directory, given.tokenizer)
