"""Tensors that wait in host memory while nobody reads them (models.offload).

Only the memory behind a tensor goes: its storage becomes empty, and later as large as before. The tensor and every view
of it stay the objects that they are, so that nobody who holds one need know. megatron-core frees its gradient buffers
in the same way (`offload_grad_buffers`, which we use). Its `offload_to_cpu` for optimizers will not do: it takes new
host memory each time, none of it pinned, and in float32, where the optimizer's parameters are the model's own, it moves
the weights as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

SMALLEST_PIECE = 1 << 20


class HostCopies:
    """The memory behind some tensors, which is either on their device or, as a copy, on the host.

    No call waits for the GPU: the copies, and whatever reads the tensors, run one after the other on one stream. The
    host memory is taken once. On the CPU it is ordinary memory, and all else is the same.
    """

    def __init__(self, tensors: Iterable[Tensor], *, constant: bool = False) -> None:
        """constant: the tensors never change, so that they are copied to the host once."""
        by_memory = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors if tensor.numel()}
        self._memory = [_as_bytes(tensor) for tensor in by_memory.values()]  # once, however many views it has
        self._constant = constant
        self._host: list[list[Tensor]] = []
        self.is_offloaded = False

    @property
    def num_bytes(self) -> int:
        return sum(memory.numel() for memory in self._memory)

    @torch.no_grad()
    def offload(self) -> None:
        """Free the device memory; its content waits on the host."""
        if self.is_offloaded:
            return
        is_first = not self._host
        if is_first:
            self._host = [_host_memory(memory) for memory in self._memory]
        for memory, pieces in zip(self._memory, self._host, strict=True):
            if is_first or not self._constant:
                for piece, part in zip(pieces, _cut(memory, pieces), strict=True):
                    piece.copy_(part, non_blocking=True)
            memory.untyped_storage().resize_(0)
        self.is_offloaded = True

    @torch.no_grad()
    def restore(self) -> None:
        """Take device memory again, and fill it."""
        if not self.is_offloaded:
            return
        for memory, pieces in zip(self._memory, self._host, strict=True):
            memory.untyped_storage().resize_(memory.numel())
            for piece, part in zip(pieces, _cut(memory, pieces), strict=True):
                part.copy_(piece, non_blocking=True)
        self.is_offloaded = False

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, the tensors can be read; after it they are where they were."""
        was_offloaded = self.is_offloaded
        self.restore()
        try:
            yield
        finally:
            if was_offloaded:
                self.offload()


def _as_bytes(tensor: Tensor) -> Tensor:
    """All memory behind a tensor, as one row of bytes."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _host_memory(memory: Tensor) -> list[Tensor]:
    """As many bytes on the host, pinned for a GPU. In pieces of powers of two: to the next of these torch rounds pinned
    memory up, which of one piece would waste almost half."""
    sizes, left = [], memory.numel()
    while left:
        sizes.append(1 << (left.bit_length() - 1) if left > SMALLEST_PIECE else left)
        left -= sizes[-1]
    return [torch.empty(size, dtype=torch.uint8, pin_memory=memory.device.type == "cuda") for size in sizes]


def _cut(memory: Tensor, pieces: list[Tensor]) -> tuple[Tensor, ...]:
    return memory.split([len(piece) for piece in pieces])
