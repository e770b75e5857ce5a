"""One short run of each trainer on the tiny world, and the files that keep its curves."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tests.faults.running import Call, arguments, call_all, metrics_of
from tests.ranks import run_ranks
from tests.training.running import world_size

DIRECTORY = Path(__file__).parent
LEARNING_RATES = ("optimizer.lr=0.001", "critic_optimizer.lr=0.001")
PPO = ("ppo", *LEARNING_RATES, "ppo.epochs=2")  # in the second, ratios differ from 1
RUNS: dict[str, tuple[str, ...]] = {
    "sft": ("sft", "optimizer.lr=0.001"),
    "reward": ("reward", "optimizer.lr=0.001"),
    "dpo": ("dpo", "optimizer.lr=0.001"),
    "ppo": (*PPO, "gil.num_groups=1", "ppo.kl_coef=0.1"),
    "ppo_gil": (*PPO, "gil.num_groups=2", "ppo.kl_coef=0"),
}
"""Name -> the stage, and what differs from the settings of tests/faults/running.py."""

Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Machine:
    """What decides on the last bits of a sum on the CPU: torch's version, the instructions that its own kernels use,
    and the processor, by which MKL and oneDNN choose theirs."""

    torch: str
    instructions: str
    processor: str

    @classmethod
    def here(cls) -> Machine:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return cls(
            torch=torch.__version__,
            instructions=torch.backends.cpu.get_cpu_capability(),
            processor=names[0].partition(":")[2].strip() if names else platform.machine(),
        )


def run_all(world: Path, directory: Path, layout: dict[str, Any]) -> dict[str, Rows]:
    """The metrics of every run at this layout, one row an iteration, without times."""
    sizes = [f"parallel.{key}={value}" for key, value in layout.items() if key != "world"]
    calls = [
        Call(arguments(stage, world, directory / name, *settings, *sizes)) for name, (stage, *settings) in RUNS.items()
    ]
    for rank in run_ranks(call_all, world_size(layout), calls, world, timeout_s=1200.0):
        for name, answer in zip(RUNS, rank, strict=True):
            assert answer.code == 0, f"{name}: {answer.stderr}"
    return {name: [_without_memory(row) for row in metrics_of(directory / name)] for name in RUNS}


def read(name: str) -> tuple[Machine, Rows]:
    """The machine that wrote the curves, and the curves."""
    machine, *rows = [json.loads(line) for line in _file(name).read_text().splitlines()]
    return Machine(**machine), rows


def write(name: str, rows: Rows) -> Path:
    """Numbers as Python prints them, which is exact."""
    lines = [asdict(Machine.here()), *rows]
    _file(name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return _file(name)


def _file(name: str) -> Path:
    return DIRECTORY / f"{name}.jsonl"


def _without_memory(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith("memory/")}
