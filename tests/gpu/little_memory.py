"""`python -m tests.gpu.little_memory MIB COMMAND ...`: megatron-gil on a device that has only so many MiB to give."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from megatron_gil.cli import main
from megatron_gil.training import commands

MIB = 1 << 20


def limit(num_bytes: int) -> None:
    """Of the GPU where there is one, else of what this process may map beside what it has already."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, num_bytes / total), 0)
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + num_bytes,) * 2)


if __name__ == "__main__":
    assert commands  # imported before the limit: libraries are mapped, too
    limit(int(sys.argv[1]) * MIB)
    sys.exit(main(sys.argv[2:]))
