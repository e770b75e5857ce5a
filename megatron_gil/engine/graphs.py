"""CUDA graphs of a step that works in place on tensors that stay where they are."""

from __future__ import annotations

from collections.abc import Callable

import torch


class CapturedSteps:
    """Calls `step(columns)`; from the second call with a number on, as a replay of what the first one was.

    The step reads and writes fixed tensors alone and asks the host for nothing. All graphs share one memory pool: no
    two of them run at once, and nothing that one leaves in it is read by another.
    """

    def __init__(self, step: Callable[[int], None]) -> None:
        self._step = step
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, columns: int) -> None:
        graph = self._graphs.get(columns)
        if graph is not None:
            graph.replay()
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step(columns)  # a step as any other; kernels and libraries are loaded in it, which capture forbids
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Capture runs nothing. NCCL's watchdog is another thread, which may ask CUDA for events meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._step(columns)
        self._graphs[columns] = graph
