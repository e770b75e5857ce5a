"""What torch.cuda, torch.distributed and the autograd engine are given in the place of a GPU's answers."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import types
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.autograd import Variable
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from tests.pretend.calls import BASE
from tests.pretend.places import Places, tensors_in
from tests.pretend.report import Report

MEMORY = 80 << 30


def count_gpus() -> int:
    """One for each process of this machine."""
    names = ("LOCAL_WORLD_SIZE", "WORLD_SIZE")
    return max(1, next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdecimal()), 1))


@contextmanager
def answered_by(places: Places, report: Report, calls: TorchFunctionMode) -> Iterator[None]:
    """Inside, torch has GPUs."""
    with ExitStack() as stack:
        streams = _streams(places, report)
        for name, value in {**_devices(places), **_memory(), **streams}.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value, create=True))
            if hasattr(torch.cuda.random, name):  # imported there by its name
                stack.enter_context(mock.patch.object(torch.cuda.random, name, value))
        # torch.optim asks a torch that is built for CUDA; one that is not says that there is no accelerator.
        stack.enter_context(mock.patch.object(torch.accelerator, "current_stream", streams["current_stream"]))
        engine = _Engine(Variable._execution_engine, places, calls)
        stack.enter_context(mock.patch.object(Variable, "_execution_engine", engine))
        # A graph is what its steps are: there is nothing to record from.
        step = "megatron_gil.engine.graphs.CapturedSteps.__call__"
        stack.enter_context(mock.patch(step, lambda self, step, columns: step(columns)))
        graph: Any = importlib.import_module("torch._C._autograd")
        hooks = _under(calls, graph._push_saved_tensors_default_hooks)
        stack.enter_context(mock.patch.object(graph, "_push_saved_tensors_default_hooks", hooks))
        for name in ("cuda", "type"):
            stack.enter_context(mock.patch.object(torch.Tensor, name, getattr(BASE, name)))
        for name in ("init_process_group", "new_group"):
            stack.enter_context(mock.patch.object(dist, name, _over_gloo(getattr(dist, name))))
        yield


def _devices(places: Places) -> dict[str, Any]:
    def set_device(device: Any) -> None:
        found = places.read(device)
        assert found is not None
        if found.type == "cuda":
            places.current = found.index

    def exchange(index: int) -> int:
        before = places.current
        if index >= 0:
            set_device(index)
        return before

    def properties(device: Any = None) -> Any:
        found = places.read("cuda" if device is None else device)
        assert found is not None
        # Ranks of other nodes are processes of this machine too; a GPU is another one there.
        node = int(os.environ.get("RANK", "0")) - int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))
        return types.SimpleNamespace(
            name="pretended",
            major=9,
            minor=0,
            total_memory=MEMORY,
            multi_processor_count=132,
            uuid=uuid.uuid5(uuid.NAMESPACE_OID, f"pretended GPU {found.index} of node {node}"),
            pci_bus_id=found.index,
            L2_cache_size=50 << 20,
            warp_size=32,
        )

    # Random numbers for tensors on a GPU come from the CPU's generator, which torch.manual_seed has seeded.
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "init": _nothing,
        "_lazy_init": _nothing,
        "device_count": lambda: places.num_gpus,
        "current_device": lambda: places.current,
        "set_device": set_device,
        "_exchange_device": exchange,
        "_maybe_exchange_device": exchange,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "pretended",
        "get_device_properties": properties,
        "get_arch_list": lambda: ["sm_90"],
        "default_generators": (torch.default_generator,) * places.num_gpus,
        "manual_seed_all": _nothing,
        "graph_pool_handle": lambda: (0, 0),
        "is_current_stream_capturing": lambda: False,
    }


def _memory() -> dict[str, Any]:
    names = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    return {
        **{name: lambda device=None: 0 for name in names},
        **dict.fromkeys(("empty_cache", "reset_peak_memory_stats", "reset_accumulated_memory_stats"), _nothing),
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "memory_stats": lambda device=None: {},
        "set_per_process_memory_fraction": _nothing,
        "ipc_collect": _nothing,
    }


def _streams(places: Places, report: Report) -> dict[str, Any]:
    class Event:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            pass

        record = wait = staticmethod(lambda *args: None)

        def synchronize(self) -> None:
            report.sync("event")

        def query(self) -> bool:
            return True

        def elapsed_time(self, end: Any) -> float:
            return 0.0

    class Stream:
        cuda_stream = 0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.device = torch.device("cuda", places.current)

        wait_stream = wait_event = staticmethod(lambda *args: None)

        def record_event(self, event: Any = None) -> Any:
            return event or Event()

        def synchronize(self) -> None:
            report.sync("stream")

        def query(self) -> bool:
            return True

        def is_capturing(self) -> bool:
            return False

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *args: Any) -> None:
            pass

    return {
        "Event": Event,
        "Stream": Stream,
        "current_stream": lambda device=None: Stream(),
        "default_stream": lambda device=None: Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda device=None: report.sync("torch.cuda.synchronize"),
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": _nothing,
    }


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _on(calls: TorchFunctionMode) -> Any:
    """torch takes a function mode off around the function that it answers; Python called from within asks too."""
    return contextlib.nullcontext() if calls in _get_current_function_mode_stack() else calls


def _under(calls: TorchFunctionMode, push: Any) -> Any:
    """The hooks that pack and unpack what autograd saves (activation checkpointing), called with the mode on."""

    def wrap(hook: Any) -> Any:
        def call(found: Any) -> Any:
            with _on(calls):
                return hook(found)

        return call

    return lambda pack, unpack: push(wrap(pack), wrap(unpack))


class _Engine:
    """The autograd engine, called with the function mode on and the device of what is differentiated named."""

    def __init__(self, engine: Any, places: Places, calls: TorchFunctionMode) -> None:
        self._engine, self._places, self._calls = engine, places, calls

    def run_backward(self, outputs: Any, *args: Any, **kwargs: Any) -> Any:
        device = self._places.common(tensors_in(outputs))
        with _on(self._calls):
            return self._places.call(self._engine.run_backward, (outputs, *args), kwargs, device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def _over_gloo(start: Any) -> Any:
    @functools.wraps(start)
    def start_over_gloo(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(start).bind(*args, **kwargs)
        bound.arguments.pop("device_id", None)
        if bound.arguments.get("backend") is not None:
            bound.arguments["backend"] = "gloo"
        return start(*bound.args, **bound.kwargs)

    return start_over_gloo
