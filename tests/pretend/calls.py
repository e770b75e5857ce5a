"""In Python: what is asked about devices is answered, and what is moved or made goes where the caller says."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.pretend.places import CPU, DeviceMistake, Places, tensors_in
from tests.pretend.report import Report, find_line

# Past what the shim for megatron.core may have put in the place of Tensor.cuda and Tensor.type in this process.
BASE: Any = torch._C.TensorBase


def _getter(name: str) -> Any:
    return inspect.getattr_static(Tensor, name).__get__


# Reading `shape`, `grad`, ... makes nothing on any device.
_ATTRIBUTES = frozenset(
    _getter(n) for n in dir(Tensor) if inspect.isgetsetdescriptor(inspect.getattr_static(Tensor, n))
)


class Calls(TorchFunctionMode):
    """Answers for tensors that only pretend, on this thread."""

    def __init__(self, places: Places, report: Report) -> None:
        super().__init__()
        self._places, self._report = places, report
        self._answers: dict[Any, Callable[..., Any]] = {
            _getter("device"): places.of,
            _getter("is_cuda"): self._is_on_gpu,
            _getter("is_cpu"): lambda tensor: not self._is_on_gpu(tensor),
            Tensor.get_device: lambda tensor: places.of(tensor).index if self._is_on_gpu(tensor) else -1,
            Tensor.numpy: self._host_only(Tensor.numpy),
            Tensor.__array__: self._host_only(Tensor.__array__),
            Tensor.pin_memory: self._host_only(lambda tensor, *_: tensor.clone()),
            Tensor.tolist: self._to_list,
            Tensor.to: self._to,
            BASE.cuda: lambda tensor, device=None, *_, **__: self._move(tensor, places.read(device or "cuda")),
            Tensor.cpu: lambda tensor, *_, **__: self._move(tensor, CPU),
            BASE.type: self._type,
            Tensor.__setitem__: self._set_item,
            Tensor.__deepcopy__: self._deep_copy,
            torch.tensor: self._from_data(torch.tensor),
            Tensor.new_tensor: self._from_data(Tensor.new_tensor),
            torch.as_tensor: self._as_tensor,
            torch.asarray: self._as_tensor,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = self._answers.get(func)
        if answer is None:
            return func(*args) if func in _ATTRIBUTES else self._call(func, args, dict(kwargs or {}))
        return answer(*args, **(kwargs or {}))

    def _call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        named = self._places.read(kwargs.get("device"))
        if kwargs.pop("pin_memory", False) and named is not None and named.type == "cuda":
            raise DeviceMistake(f"only dense CPU tensors can be pinned ({func.__name__} at {find_line().number})")
        if named is None:
            return self._places.call(func, args, kwargs, self._places.common(tensors_in(args, kwargs)))
        kwargs["device"] = CPU if named.type == "cuda" else named
        return self._places.call(func, args, kwargs, named, explicit=True)

    def _is_on_gpu(self, tensor: Tensor) -> bool:
        return self._places.of(tensor).type == "cuda"

    def _host_only(self, func: Any) -> Callable[..., Any]:
        def refuse_or_call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._is_on_gpu(tensor):
                place = self._places.of(tensor)
                raise DeviceMistake(
                    f"can't take the memory of a {place} device type tensor ({func.__name__} at {find_line().number}). "
                    "Use Tensor.cpu() to copy the tensor to host memory first."
                )
            return func(tensor, *args, **kwargs)

        return refuse_or_call

    def _to_list(self, tensor: Tensor) -> Any:
        return self._move(tensor.detach(), CPU, kind="tolist").tolist()

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Every form of Tensor.to: (device, dtype, non_blocking, copy), (dtype, ...) and (other, ...)."""
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        memory_format = kwargs.pop("memory_format", None)
        flags = [a for a in args if isinstance(a, bool)]
        non_blocking = kwargs.get("non_blocking", flags[0] if flags else False)
        copy = kwargs.get("copy", flags[1] if len(flags) > 1 else False)
        wanted = [*(a for a in args if a is not None and not isinstance(a, bool))]
        wanted += [kwargs[name] for name in ("device", "dtype", "other", "tensor") if name in kwargs]
        device, dtype = self._places.of(tensor), tensor.dtype
        for found in wanted:
            if isinstance(found, torch.dtype):
                dtype = found
            elif isinstance(found, Tensor):
                device, dtype = self._places.of(found), found.dtype
            else:
                device = self._places.read(found) or device
        moved = self._move(tensor, device, waits=not non_blocking)
        if copy and moved is tensor and dtype == tensor.dtype:
            moved = tensor.clone()
        form = {} if memory_format is None else {"memory_format": memory_format}
        return moved.to(dtype, **form) if form or dtype != moved.dtype else moved

    def _move(
        self, tensor: Tensor, device: torch.device | None, *, waits: bool = True, kind: str | None = None
    ) -> Tensor:
        assert device is not None
        here = self._places.of(tensor)
        if device == here:
            return tensor
        if "meta" in (device.type, here.type):
            return tensor.to(device)
        if waits and "cpu" in (device.type, here.type):
            self._report.sync(kind or f"copy to {device.type}")
        elif "cpu" not in (device.type, here.type):
            self._report.launch("copy to another GPU")
        moved: Any = _Move.apply(tensor, self._places, here, device)
        return moved

    def _type(self, tensor: Tensor, dtype: Any = None, *_: Any, **__: Any) -> Any:
        name = BASE.type(tensor)
        if dtype is None:
            return name.replace("torch.", "torch.cuda.") if self._is_on_gpu(tensor) else name
        if isinstance(dtype, str):
            moved = self._move(tensor, self._places.read("cuda" if ".cuda." in dtype else "cpu"))
            return BASE.type(moved, dtype.replace(".cuda.", "."))
        return self._to(tensor, dtype) if isinstance(dtype, torch.dtype) else BASE.type(tensor, dtype)

    def _set_item(self, tensor: Tensor, key: Any, value: Any) -> None:
        """A Python number becomes a tensor beside the one it is put into, by a kernel."""
        place = self._places.of(tensor)
        if isinstance(value, bool | int | float) and place.type == "cuda":
            value = self._places.call(torch.full, ((), value), {"dtype": tensor.dtype}, place)
        self._places.call(Tensor.__setitem__, (tensor, key, value), {}, place)

    def _deep_copy(self, tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        copied = tensor.__deepcopy__(memo)
        self._places.put(copied, self._places.of(tensor))
        return copied

    def _from_data(self, func: Any) -> Callable[..., Tensor]:
        """Of torch.tensor and Tensor.new_tensor: numbers go through host memory, tensors among them are read there."""

        def make(*args: Any, **kwargs: Any) -> Tensor:
            data = args[-1] if args else kwargs["data"]
            device = self._places.read(kwargs.pop("device", None))
            if device is None:
                of_device = args[:1] if func is Tensor.new_tensor else [data] if isinstance(data, Tensor) else []
                device = self._places.common(tensors_in(of_device))
            inside = [] if isinstance(data, Tensor) else list(tensors_in(data))
            self._report.sync("value", sum(map(self._is_on_gpu, inside)))
            made = func(*args, **kwargs, device=CPU if device.type == "cuda" else device)
            if not isinstance(data, Tensor):
                self._report.sync("copy to cuda", device.type == "cuda")
            elif device != self._places.of(data):
                self._report.sync(f"copy to {device.type}")
            self._places.put(made, device)
            return made

        return make

    def _as_tensor(self, data: Any, dtype: Any = None, device: Any = None, **kwargs: Any) -> Tensor:
        inside = [] if isinstance(data, Tensor) else list(tensors_in(data))
        self._report.sync("value", sum(map(self._is_on_gpu, inside)))
        made = torch.as_tensor(data, dtype=dtype, **kwargs)
        return made if device is None else self._move(made, self._places.read(device))


class _Move(torch.autograd.Function):
    """A copy on another device; its gradient goes back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, places: Places, here: torch.device, there: torch.device) -> Tensor:
        ctx.places, ctx.here, ctx.there = places, here, there
        moved = tensor.clone()
        places.put(moved, there)
        return moved

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad = grads[0].clone()
        ctx.places.put(grad, ctx.here)
        return grad, None, None, None
