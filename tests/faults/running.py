"""Whole commands in real ranks that are interrupted at a chosen place, and what they leave behind."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_gil.cli import main
from megatron_gil.engine.files import digest
from megatron_gil.jsonl import iter_jsonl
from megatron_gil.training.run.progress import Progress
from tests.training.running import use_cache

NUM_ITERATIONS = 4


def arguments(stage: str, root: Path, run: Path, *more: str) -> list[str]:
    """A run of NUM_ITERATIONS on the tiny world that saves and evaluates every second one. 23 rows to evaluate are 12
    on one rank and 11 on the other."""
    data = {"sft": "demonstrations", "reward": "preferences", "dpo": "preferences", "ppo": "prompts"}[stage]
    held_out = run.parent / f"{data}_23.jsonl"
    if not held_out.exists():
        rows = (root / f"{data}.jsonl").read_text().splitlines(keepends=True)[:23]
        beside = held_out.with_suffix(f".{os.getpid()}")
        beside.write_text("".join(rows))
        beside.replace(held_out)
    common = [
        f"run.dir={run}",
        f"data.train={root / data}.jsonl",
        f"data.eval={held_out}",
        "data.max_tokens=48",
        "data.max_prompt_tokens=32",
        "batch.global_size=8",
        "batch.micro_size=2",
        "optimizer.lr=0.01",
        "checkpoint.every=2",
        "log.eval_every=2",
        "log.tensorboard=false",
        "parallel.timeout_s=600",
    ]
    own = {
        "sft": [f"models.policy={root / 'policy'}"],
        "reward": [f"models.reward_model={root / 'policy'}"],
        "dpo": [f"models.policy={root / 'policy'}"],
        "ppo": [
            f"models.policy={root / 'policy'}",
            f"models.reward_model={root / 'reward_model'}",
            f"ppo.iterations={NUM_ITERATIONS}",
            "ppo.prompts=8",
            "critic_optimizer.lr=0.01",
            "sampling.max_new_tokens=6",
            "sampling.micro_size=2",
            "gil.classifier=own_model",
            "gil.warmup_updates=1",
            "gil.ramp_updates=2",
        ],
    }[stage]
    if stage != "ppo":
        own.append(f"train.updates={NUM_ITERATIONS}")
    return [stage, *common, *own, *more]


@dataclass(frozen=True)
class Interruption:
    """A signal that rank `rank` gets as it enters a phase for the n-th time (from 1)."""

    phase: str
    occurrence: int
    signal: int
    rank: int


def phase_name(phase: str) -> str:
    """Without the number of the iteration."""
    return phase.rstrip("0123456789 ")


@contextlib.contextmanager
def interrupted(interruption: Interruption | None, phases: list[str]) -> Iterator[None]:
    """Send this process the signal at that place; `phases` gets the name of each phase entered."""
    enter, seen = Progress.enter, Counter[str]()

    def enter_and_interrupt(self: Progress, phase: str, batch: Any = None) -> None:
        enter(self, phase, batch)
        name = phase_name(phase)
        phases.append(name)
        seen[name] += 1
        here = interruption and (interruption.phase, interruption.occurrence) == (name, seen[name])
        if interruption and here and interruption.rank == int(os.environ["RANK"]):
            os.kill(os.getpid(), interruption.signal)

    with mock.patch.object(Progress, "enter", enter_and_interrupt):
        yield


@dataclass(frozen=True)
class Call:
    """One command in all ranks."""

    arguments: list[str]
    interruption: Interruption | None = None


@dataclass(frozen=True)
class Answer:
    code: int
    stderr: str
    phases: list[str]


def call_all(calls: list[Call], root: Path) -> list[Answer]:
    """What one rank answers to commands one after the other."""
    use_cache(root)
    answers = []
    for call in calls:
        phases: list[str] = []
        with contextlib.redirect_stderr(io.StringIO()) as said, interrupted(call.interruption, phases):
            code = main(call.arguments)
        answers.append(Answer(code, said.getvalue(), phases))
    return answers


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without the times."""
    rows = [row for _, row in iter_jsonl(run / "metrics.jsonl")]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def final_weights(run: Path) -> dict[str, str]:
    """SHA-256 of every tensor file of the last checkpoint, which is that of the last iteration: optimizers too."""
    path = max((run / "checkpoints").glob("iter_*"))
    return {str(file.relative_to(path)): digest(file)["sha256"] for file in sorted(path.rglob("*.safetensors"))}


def check_equal(run: Path, whole: Path) -> None:
    """The run ended as the one that nothing interrupted: the same numbers once each, the same weights, bit for bit."""
    assert metrics_of(run) == metrics_of(whole)
    assert [row["iteration"] for row in metrics_of(run)] == list(range(NUM_ITERATIONS))
    assert final_weights(run) == final_weights(whole)
    assert final_weights(run)
    assert not list((run / "checkpoints").glob(".*")), "files are left beside the checkpoints"


STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
