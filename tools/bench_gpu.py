"""`bench.py gpu`: what one GPU makes of the engine, as shares of what the same GPU can do.

Random weights are made on the device. Each shape is measured in processes of its own (gpu_measure.py), one that trains,
scores and decodes with one model, one for PPO-GIL with four: what one of them leaves behind, or breaks, no other sees.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_results import Results, describe_machine, write_whole

from megatron_gil.config import ConfigError, require
from megatron_gil.planning.hardware import GPUS

SHAPES = ("160m", "1.3b", "3b")
PROCESSES = (("train", "score", "decode"), ("iteration",))
TIMEOUT_S = 300
MEASURE = Path(__file__).with_name("gpu_measure.py")
GIB = 2**30


def bench_gpu(*, device: str, shapes: Sequence[str], json_file: Path, markdown_file: Path, resume: bool) -> int:
    """Measures what the JSON file does not hold; the exit code. ConfigError without the device that was asked for."""
    require(
        device == "cpu" or torch.cuda.is_available(), "--device cuda: no CUDA device; --device cpu tries the script"
    )
    started = time.perf_counter()
    results = Results.continued(json_file, describe_machine(device))
    if not resume:
        results.measured.clear()
    results.save()
    failed: list[str] = []
    for shape, names in _processes(shapes):
        while missing := [name for name in names if not _is_done(results, shape, name, failed)]:
            _measure(device, shape, missing, json_file)
            results = Results.read(json_file)
            if not _is_done(results, shape, missing[0], failed):
                failed.append(_key(shape, missing[0]))
            for name in missing:
                if _is_done(results, shape, name, []):
                    _say(_key(shape, name), results, time.perf_counter() - started)
        write_whole(markdown_file, format_markdown(results))
        if "ceilings" in failed:
            break  # every share is of one of them
    print(f"\n{format_markdown(results)}\n{json_file}, {markdown_file}; {time.perf_counter() - started:.0f} s")
    for name in failed:
        print(f"bench gpu: {name} failed; its error stands above", file=sys.stderr)
    return 1 if failed else 0


def _processes(shapes: Sequence[str]) -> Iterator[tuple[str, Sequence[str]]]:
    yield "", ("ceilings",)
    for shape in shapes:
        for names in PROCESSES:
            yield shape, names


def _key(shape: str, name: str) -> str:
    return f"{shape} {name}".strip()


def _is_done(results: Results, shape: str, name: str, failed: Sequence[str]) -> bool:
    return _key(shape, name) in (*results.measured, *failed)


def _measure(device: str, shape: str, names: Sequence[str], json_file: Path) -> None:
    """One process, to its end; its errors go to stderr."""
    root = str(MEASURE.parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, MEASURE, device, shape, ",".join(names), json_file]
    try:
        subprocess.run(command, env=environment, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        print(f"bench gpu: {shape} {', '.join(names)} took more than {TIMEOUT_S} s", file=sys.stderr)


def _say(name: str, results: Results, elapsed: float) -> None:
    found = results.measured[name]
    rate = found.get("tokens_per_s") or found.get("new_tokens_per_s")
    text = found.get("skipped") or (f"{rate['median']:,.0f} tokens/s" if rate else "done")
    print(f"[{elapsed:4.0f} s] {name}: {text}", flush=True)


def format_markdown(results: Results) -> str:
    machine, measured = results.machine, results.measured
    lines = ["# One GPU" if machine["device"] == "cuda" else "# A trial on the CPU", "", f"{_describe(machine)}.", ""]
    outcomes = list(results.tests.values())
    if outcomes:
        counts = ", ".join(f"{outcomes.count(o)} {o}" for o in ("passed", "failed", "skipped") if o in outcomes)
        lines += [f"tests/gpu: {counts}.", *(f"- failed: {t}" for t, o in results.tests.items() if o == "failed"), ""]
    ceilings = measured.get("ceilings")
    if ceilings is None:
        return "\n".join(lines)
    lines += [
        f"The device by itself: {_spread(ceilings['matmul_flops'], 1e12)} TFLOP/s in a large bfloat16 product of "
        f"random matrices, {_spread(ceilings['copy_bytes_per_s'], 1e12, 2)} TB/s read and written by a large copy. "
        "bfloat16 throughout, random weights; medians (least to most).",
        "",
    ]
    for name in ("train", "score", "decode", "iteration"):
        found = {key.split()[0]: value for key, value in measured.items() if key.endswith(f" {name}")}
        if found:
            lines += [*_TABLES[name](found, _peak_flops(machine)), ""]
    return "\n".join(lines)


def _describe(machine: dict[str, Any]) -> str:
    memory = f", {machine['memory_bytes'] / GIB:.0f} GiB" if "memory_bytes" in machine else ""
    rest = [f"{key} {value}" for key, value in machine.items() if key not in ("device", "name", "memory_bytes")]
    return f"{machine['name']}{memory}; {', '.join(rest)}"


def _peak_flops(machine: dict[str, Any]) -> float | None:
    """The data sheet's, where planning/hardware.py has this GPU."""
    found = [gpu.peak_flops for name, gpu in GPUS.items() if name.upper() in machine["name"].upper()]
    return found[0] if found else None


def _train(found: dict[str, Any], peak: float | None) -> list[str]:
    rows = []
    for shape, entry in found.items():
        if "skipped" in entry:
            rows.append([shape, entry["skipped"], *[""] * 6])
            continue
        mfu = f"{entry['flops'] / peak:.2f}" if peak else "no data sheet"
        rate, share = _spread(entry["tokens_per_s"], 1, 0), f"{entry['share_of_product']:.2f}"
        rows.append([shape, rate, mfu, share, str(entry["micro_size"]), entry["recompute"], *_bytes(entry)])
    head = ["trained", "tokens/s", "MFU", "share of the product", "rows of a microbatch", "recompute", *_BYTES]
    return _table(head, rows)


def _score(found: dict[str, Any], peak: float | None) -> list[str]:
    rows = [
        [shape, entry["skipped"], ""]
        if "skipped" in entry
        else [shape, _spread(entry["tokens_per_s"], 1, 0), f"{entry['share_of_product']:.2f}"]
        for shape, entry in found.items()
    ]
    return _table(["scored", "tokens/s", "share of the product"], rows)


def _decode(found: dict[str, Any], peak: float | None) -> list[str]:
    rows = []
    for shape, entry in found.items():
        if "skipped" in entry:
            rows.append([shape, entry["skipped"], *[""] * 4])
            continue
        rate, limit = _spread(entry["tokens_per_s"], 1, 0), f"{entry['limit_tokens_per_s']:,.0f}"
        step, share = _spread(entry["ms_per_step"], 1, 2), f"{entry['share_of_limit']:.2f}"
        rows.append([shape, str(entry["rows"]), rate, step, limit, share])
    head = ["decoded", "rows", "tokens/s", "ms a step", "tokens/s at the copy's bandwidth", "share"]
    return _table(head, rows)


def _iteration(found: dict[str, Any], peak: float | None) -> list[str]:
    rows = []
    for shape, entry in found.items():
        if "skipped" in entry:
            rows.append([shape, entry["skipped"], *[""] * 8])
            continue
        parts = [_spread(entry[part], 1, 2) for part in ("seconds", "rollout", "score", "update")]
        rate = _spread(entry["new_tokens_per_s"], 1, 0)
        rows.append([shape, *parts, rate, str(entry["micro_size"]), entry["recompute"], *_bytes(entry)])
    head = ["PPO-GIL iteration", "seconds", "rollout", "score, shaping", "update", "new tokens/s"]
    return _table([*head, "rows of a microbatch", "recompute", *_BYTES], rows)


_BYTES = ("peak memory, GiB", "of the plan's")
_TABLES = {"train": _train, "score": _score, "decode": _decode, "iteration": _iteration}


def _bytes(entry: dict[str, Any]) -> list[str]:
    peak, planned = entry["peak_bytes"], entry["planned_bytes"]
    return ["not measured", ""] if peak is None else [f"{peak / GIB:.2f}", f"{peak / planned:.2f}"]


def _spread(found: dict[str, float], unit: float, digits: int = 1) -> str:
    median, least, most = (f"{found[key] / unit:,.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({least} to {most})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def parse_shapes(text: str | None, device: str) -> list[str]:
    """Names between commas; all of them on a GPU, the tiny one on the CPU."""
    known = (*SHAPES, "tiny")
    names: list[str] = text.split(",") if text else [*(SHAPES if device == "cuda" else ("tiny",))]
    for name in names:
        if name not in known:
            raise ConfigError(f"--shapes {name} is not one of {', '.join(known)}")
    return names
