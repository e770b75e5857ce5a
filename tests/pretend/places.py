"""Where each tensor pretends to lie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

CPU = torch.device("cpu")
_PURGE_EVERY = 20_000


class DeviceMistake(RuntimeError):
    """What CUDA would have refused."""


class Named(NamedTuple):
    """The device of the torch function that Python is in."""

    device: torch.device
    explicit: bool
    """Whether the caller named it; else it is that of the function's tensors."""


class Places:
    """The device of each storage, and which GPU of how many is the current one.

    The table is keyed by storage, because views share one. What is not in it lies where torch says. While a weak
    reference is held here no other storage gets the same address.
    """

    def __init__(self, num_gpus: int) -> None:
        self.num_gpus, self.current = num_gpus, 0
        self._gpu_storages: dict[int, tuple[StorageWeakRef, torch.device]] = {}
        self._purge_at = _PURGE_EVERY
        self.named: Named | None = None

    def of(self, tensor: torch.Tensor) -> torch.device:
        with torch._C.DisableTorchFunction():
            found = self._gpu_storages.get(tensor.untyped_storage()._cdata)
            return tensor.device if found is None else found[1]

    def put(self, tensor: torch.Tensor, device: torch.device) -> None:
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
            if device.type == "cuda":
                self._gpu_storages[storage._cdata] = (StorageWeakRef(storage), device)
            else:
                self._gpu_storages.pop(storage._cdata, None)
        if len(self._gpu_storages) > self._purge_at:
            gone = [key for key, (storage, _) in self._gpu_storages.items() if storage.expired()]
            for key in gone:
                del self._gpu_storages[key]
            self._purge_at = len(self._gpu_storages) + _PURGE_EVERY

    def read(self, argument: Any) -> torch.device | None:
        """The device that a `device=` argument means, a GPU with its number; None for None."""
        if argument is None:
            return None
        device = torch.device("cuda", argument) if isinstance(argument, int) else torch.device(argument)
        if device.type != "cuda":
            return device
        index = self.current if device.index is None else device.index
        if index >= self.num_gpus:
            raise DeviceMistake(f"CUDA error: invalid device ordinal ({device} of {self.num_gpus})")
        return torch.device("cuda", index)

    def common(self, tensors: Iterator[torch.Tensor] | list[torch.Tensor]) -> torch.device:
        """The GPU of the first tensor on one, else the CPU."""
        return next((device for device in map(self.of, tensors) if device.type == "cuda"), CPU)

    def call(self, func: Any, args: Any, kwargs: Any, device: torch.device, *, explicit: bool = False) -> Any:
        """func(*args, **kwargs). torch's C++ code reads the true device of a tensor; what it makes lies on this one."""
        outer, self.named = self.named, Named(device, explicit)
        try:
            return func(*args, **kwargs)
        finally:
            self.named = outer


def tensors_in(*found: Any) -> Iterator[torch.Tensor]:
    for part in found:
        if isinstance(part, torch.Tensor):
            yield part
        elif isinstance(part, list | tuple):
            yield from tensors_in(*part)
        elif isinstance(part, dict):
            yield from tensors_in(*part.values())
