"""CUDA graphs of a step that works in place on tensors that stay where they are."""

from __future__ import annotations

from collections.abc import Callable

import torch


class CapturedSteps:
    """Calls `step(columns)`. The first call with a number of columns also captures a CUDA graph of the step, which
    later calls with that number replay.

    The step is the same each time, reads and writes the same tensors, and does not wait for the GPU. All graphs share
    one memory pool: no two of them run at once, and none reads what another has left there. The step is not kept here:
    its owner keeps us, and a cycle of the two would hold its tensors until Python looks for cycles.
    """

    def __init__(self) -> None:
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[int], None], columns: int) -> None:
        graph = self._graphs.get(columns)
        if graph is not None:
            graph.replay()
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(columns)  # the call itself; it also loads kernels and libraries, which capture would refuse
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Capture records the step without running it. "thread_local" because NCCL's watchdog, in another thread, may
        # query CUDA events meanwhile, which the default mode takes for an error.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            step(columns)
        self._graphs[columns] = graph
