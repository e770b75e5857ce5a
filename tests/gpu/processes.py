"""Processes that see the GPU, and others that do not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_gil.demo.tiny_llama import PAD_ID
from tests.gpu.sides import WIDE, Found
from tests.models.tiny import make_model
from tests.world import write_rows

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 300


def start(device: str, module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`python -m module` to its end; only on the device `cuda` it sees a GPU."""
    environment = os.environ | ({} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""})
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)


@dataclass(frozen=True)
class Sides:
    """Runs tests/gpu/sides.py once for each device and dtype, when it is first asked for."""

    world: Path
    place: Path
    _found: dict[tuple[str, ...], Found] = field(default_factory=dict)

    def of(self, device: str, dtype: str = "float32") -> Found:
        """bfloat16 scores, and learns from, what float32 sampled on the CPU: its own samples would soon differ."""
        key = (device, dtype)
        if key not in self._found:
            self._found[key] = self.run(device, dtype)
        return self._found[key]

    def run(self, device: str, dtype: str = "float32", name: str = "") -> Found:
        wide, out = self.place / "wide", self.place / f"{name}{device}_{dtype}.pt"
        if not wide.exists():
            make_model(wide, **WIDE)
        more: list[object] = []
        if device != "pretended" and dtype != "float32":
            self.of("cpu")
            more = ["--rollout", self.place / "cpu_float32.pt"]
        inputs = ["--world", self.world, "--wide", wide, "--device", device, "--dtype", dtype, "--out", out]
        done = start(device, "tests.gpu.sides", *inputs, *more)
        assert done.returncode == 0, done.stderr[-3000:]
        return torch.load(out, weights_only=True)


def ppo_arguments(world: Path, run: Path, *more: object) -> list[object]:
    """A PPO-GIL run of four iterations that saves after two."""
    return [
        "ppo",
        f"run.dir={run}",
        f"models.policy={world / 'policy'}",
        f"models.reward_model={world / 'reward_model'}",
        f"data.train={world / 'prompts.jsonl'}",
        "data.max_prompt_tokens=32",
        "batch.global_size=8",
        "batch.micro_size=4",
        "optimizer.lr=0.01",
        "optimizer.eps=0.01",  # tests/gpu/sides.py says why
        "critic_optimizer.lr=0.01",
        "critic_optimizer.eps=0.01",
        "checkpoint.every=2",
        "checkpoint.keep_last=9",
        "log.tensorboard=false",
        "ppo.iterations=4",
        "ppo.prompts=8",
        "ppo.responses_per_prompt=2",
        "sampling.max_new_tokens=8",
        "gil.warmup_updates=1",
        "gil.ramp_updates=2",
        *more,
    ]


def write_long_world(world: Path, place: Path) -> Path:
    """A model that takes long rows, and rows of 2,000 words: gigabytes of cache and logits beside megabytes of weights.
    The tokenizer is the tiny world's."""
    sizes: dict[str, Any] = {**WIDE, "max_position_embeddings": 8192, "pad_token_id": PAD_ID}
    make_model(place / "policy", **sizes)
    make_model(place / "reward_model", head="score", **sizes)
    for name in ("policy", "reward_model"):
        for file in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copyfile(world / name / file, place / name / file)
    write_rows(place / "prompts.jsonl", [{"prompt": f"sun {i}"} for i in range(64)])
    long = " sea" * 2000
    write_rows(place / "demonstrations.jsonl", [{"prompt": f"sun {i}", "completion": long} for i in range(64)])
    return place


def compare_runs(ours: Path, theirs: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/compare_runs.py", str(ours), str(theirs)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
