"""Pretended GPUs: the parts put together.

Every tensor is an ordinary CPU tensor with real values. A table says on which device its storage pretends to lie
(places.py); a function mode answers what Python asks of devices and moves what it moves (calls.py); a dispatch mode
refuses, in forward and backward, every ATen operation that CUDA would refuse for its devices, or in deterministic mode
for what it is (operations.py, rules.py), and counts kernel launches and host synchronisations with the line that made
them (report.py); torch.cuda's questions are answered as by a GPU, and process groups run over gloo (gpus.py).

What it cannot see: kernels and their numerics, the dtypes they take, NCCL, streams, memory, CUDA's random numbers,
other threads, reads before a non-blocking copy has ended, and what C++ or ctypes do with a tensor's address.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch._dynamo  # noqa: F401  a dispatch mode imports it at its first operation, where it must not meet a GPU

from tests.pretend.calls import Calls
from tests.pretend.gpus import answered_by, count_gpus
from tests.pretend.operations import Operations
from tests.pretend.places import Places
from tests.pretend.report import Report


@contextmanager
def pretended_gpus(num_gpus: int | None = None) -> Iterator[Report]:
    """Inside, this thread's torch has GPUs, by default one for each process of this machine; counts what they do.

    A process that has run megatron.core on the CPU keeps the shim for it, and is of no use here: start another.
    """
    places, report = Places(count_gpus() if num_gpus is None else num_gpus), Report()
    calls = Calls(places, report)
    with answered_by(places, report, calls), Operations(places, report), calls:
        yield report
