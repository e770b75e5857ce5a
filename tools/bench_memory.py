"""Bytes of tensors: what there is, and the most that a step adds."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most that tensors take at once while `run` runs: those that there are before it, each piece of memory once,
    and what it adds.

    Not the process's resident memory: on models this small, libraries are most of that.
    """
    return held_bytes() + added_bytes(run)


def added_bytes(run: Callable[[], Any]) -> int:
    """The most that torch's allocator has given at once since `run` began. What `run` frees must be its own: memory
    that is older is not counted when it goes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    profiler: Any = recorded.profiler
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    now = top = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        top = max(top, now)
    return top


def held_bytes() -> int:
    """Of every tensor that Python can reach."""
    gc.collect()
    found = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    found += [tensor.grad for tensor in found if tensor.is_leaf and tensor.grad is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
    return sum(storages.values())
