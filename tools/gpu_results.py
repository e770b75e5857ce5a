"""The one file that `make gpu` fills, as JSON and as Markdown: outcomes of tests/gpu, then what bench_gpu.py measured.

Every entry is written at once when it is known, so that a run that was ended goes on with what is missing.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import torch.cuda.nccl

from megatron_gil.training.run.directory import git_commit

PACKAGES = ("megatron-core", "transformers", "transformer-engine", "apex", "flash-attn", "triton", "numpy")


@dataclass(kw_only=True)
class Results:
    path: Path
    machine: dict[str, Any]
    """What the numbers belong to; another machine, version or commit starts a new file."""
    tests: dict[str, str] = field(default_factory=dict)
    """By test: passed, failed or skipped."""
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name, as `1.3b train`."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """What the file holds."""
        return cls(path=path, **json.loads(path.read_text(encoding="utf-8")))

    @classmethod
    def continued(cls, path: Path, machine: dict[str, Any]) -> Self:
        """What the file holds of this machine; nothing where there is no file, or it holds another's."""
        if path.exists():
            saved = cls.read(path)
            if saved.machine == machine:
                return saved
            print(f"{path} is of another machine, version or commit: all is measured anew", flush=True)
        return cls(path=path, machine=machine)

    def save(self) -> None:
        content = {"machine": self.machine, "tests": self.tests, "measured": self.measured}
        write_whole(self.path, json.dumps(content, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """The file holds all of the text or what it held before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def describe_machine(device: str) -> dict[str, Any]:
    """Device, driver, versions and commit."""
    found: dict[str, Any] = {
        "device": device,
        "commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in PACKAGES},
    }
    if device == "cpu":
        return found | {"name": _cpu_name(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    gpu = torch.cuda.get_device_properties(0)
    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else ()
    return found | {
        "name": gpu.name,
        "memory_bytes": gpu.total_memory,
        "compute_capability": f"{gpu.major}.{gpu.minor}",
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, nccl)),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else f"{platform.machine()} {sys.platform}"
