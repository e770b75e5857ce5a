"""`python -m tests.gpu.little_memory MIB COMMAND ...`: megatron-gil on a GPU that has only so many MiB to give."""

from __future__ import annotations

import sys

import torch

from megatron_gil.cli import main

if __name__ == "__main__":
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(int(sys.argv[1]) * 2**20 / total, 0)
    sys.exit(main(sys.argv[2:]))
