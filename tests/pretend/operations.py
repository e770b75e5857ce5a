"""Below Python: every ATen operation, of forward and backward, is checked and counted, and its result is placed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any, NoReturn

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pretend.places import CPU, DeviceMistake, Places, tensors_in
from tests.pretend.report import Report, find_line
from tests.pretend.rules import Check, Rule, is_mask_index, refused_as_nondeterministic, rule_of


class Operations(TorchDispatchMode):
    """Refuses what CUDA's kernels refuse, on this thread."""

    def __init__(self, places: Places, report: Report) -> None:
        super().__init__()
        self._places, self._report = places, report

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        tensors = list(tensors_in(args, kwargs))
        is_aten = func.namespace in ("aten", "prims")
        rule = rule_of(func) if is_aten else None
        if rule is None:  # a collective: each device has its backend, and the results lie where the inputs do
            device = self._alike(func, [t for t in tensors if t.numel()])
        else:
            device = self._check(func, rule, args, kwargs, tensors)
        target = self._target(rule, device, bool(tensors))
        kernel = rule if "cuda" in (device.type, target.type) else None
        if kernel is not None:
            self._check_beside(func, args, kwargs)
        known = {_storage(tensor) for tensor in tensors}
        result = func(*args, **kwargs)
        for output in () if rule is not None and rule.check is Check.NONE else tensors_in(result):
            if _storage(output) not in known:
                self._places.put(output, target)
        if kernel is not None:
            self._count(func, kernel, args, kwargs)
        return result

    def _target(self, rule: Rule | None, device: torch.device, has_tensors: bool) -> torch.device:
        named = self._places.named
        if named and (not has_tensors or (rule is not None and rule.makes and named.explicit)):
            return named.device
        return device

    def _check(
        self, func: Any, rule: Rule, args: Any, kwargs: dict[str, Any], tensors: list[torch.Tensor]
    ) -> torch.device:
        """The device of the operation; DeviceMistake where there is not one."""
        if rule.check is Check.NONE:
            return self._places.common(tensors)
        if rule.check is Check.INDEX:
            return self._check_index(func, args, kwargs)
        if rule.check is Check.EXACT:
            return self._alike(func, tensors)
        if rule.check is Check.LISTS:
            return self._alike(func, tensors_in(*(a for a in args if isinstance(a, list | tuple))))
        given = dict(enumerate(args)) | kwargs
        written = [given.get(key) for key in rule.written]
        if rule.check in (Check.ITERATOR, Check.SCALARS):
            return self._iterate(func, tensors, list(tensors_in(written)), takes_one=rule.check is Check.ITERATOR)
        columns = [list(a) for a in (*args, *kwargs.values()) if isinstance(a, list | tuple)]
        single = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        rows = [[*(t for t in row if isinstance(t, torch.Tensor)), *single] for row in zip_longest(*columns)]
        targets = {id(t) for t in tensors_in(written)}
        found = [self._iterate(func, row, [t for t in row if id(t) in targets]) for row in rows]
        return next((device for device in found if device.type == "cuda"), CPU)

    def _alike(self, func: Any, tensors: Iterable[torch.Tensor]) -> torch.device:
        devices = {self._places.of(tensor) for tensor in tensors}
        if len(devices) > 1:
            self._refuse(func, f"Expected all tensors to be on the same device, found {_names(devices)}")
        return next(iter(devices), CPU)

    def _iterate(
        self, func: Any, tensors: Sequence[torch.Tensor], written: Sequence[torch.Tensor], *, takes_one: bool = True
    ) -> torch.device:
        placed = [(tensor, self._places.of(tensor)) for tensor in tensors]
        gpus = {device for _, device in placed if device.type == "cuda"}
        if not gpus:
            return CPU
        targets = {id(tensor) for tensor in written}
        beside = [t for t, device in placed if device.type == "cpu"]
        scalars = [t for t in beside if t.dim() == 0 and id(t) not in targets]
        if len(gpus) > 1 or len(scalars) < len(beside):
            wrong = next((t for t in beside if not any(t is scalar for scalar in scalars)), None)
            what = _names(gpus) if wrong is None else f"{_names(gpus)} and a tensor {list(wrong.shape)} on cpu"
            if wrong is not None and id(wrong) in targets:
                what += ", which is to hold the result"
            self._refuse(func, f"Expected all tensors to be on the same device, found {what}")
        if takes_one and len(scalars) > 1:
            self._refuse(func, f"{len(scalars)} scalar tensors on cpu beside one on cuda, which takes one")
        return next(iter(gpus))

    def _check_index(self, func: Any, args: Any, kwargs: dict[str, Any]) -> torch.device:
        indices = [index for index in args[1] if index is not None]
        values = list(tensors_in(args[2:], kwargs))
        subject = self._places.of(args[0])
        wrong = [place for place in map(self._places.of, indices) if place not in (CPU, subject)]
        if wrong:
            self._refuse(func, f"indices on {wrong[0]} into a tensor on {subject}")
        if any(self._places.of(value) != subject and (value.dim() or subject == CPU) for value in values):
            self._refuse(func, f"values from another device than {subject}, where the tensor lies")
        return subject

    def _check_beside(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("generator") is not None:
            self._refuse(func, "Expected a 'cuda' device type for generator but found 'cpu'")
        if torch.are_deterministic_algorithms_enabled():
            name = refused_as_nondeterministic(func, args, kwargs)
            if name:
                self._refuse(func, f"{name} does not have a deterministic implementation on CUDA")

    def _count(self, func: Any, rule: Rule, args: Any, kwargs: dict[str, Any]) -> None:
        name = func._schema.name.partition("::")[2]
        if rule.launches:
            self._report.launch(name)
        if rule.syncs:
            self._report.sync("value" if name == "_local_scalar_dense" else name)
        elif rule.check is Check.INDEX:
            self._count_index(name, args)
        elif rule.check is Check.SCALARS:
            self._report.sync("copy to cuda", sum(self._places.of(tensor) == CPU for tensor in args))
        elif name == "repeat_interleave":
            self._report.sync(name, kwargs.get("output_size") is None)
        elif name == "copy_":
            self._count_copy(*args[:2], waits=not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)))

    def _count_index(self, name: str, args: Any) -> None:
        indices = [index for index in args[1] if index is not None]
        if is_mask_index(indices):
            # A mask that puts one number becomes masked_fill; any other is counted on the host.
            fills = "put" in name and args[2].numel() == 1 and len(indices) == 1 and not (len(args) > 3 and args[3])
            self._report.sync("mask as index", not fills)
        self._report.sync("copy to cuda", sum(self._places.of(index) == CPU for index in indices))

    def _count_copy(self, to: torch.Tensor, source: torch.Tensor, *, waits: bool) -> None:
        there, here = self._places.of(to), self._places.of(source)
        if waits and there != here:
            self._report.sync(f"copy to {there.type}")

    def _refuse(self, func: Any, text: str) -> NoReturn:
        raise DeviceMistake(f"{text} ({func} at {find_line().number})")


def _storage(tensor: torch.Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage()._cdata


def _names(devices: Iterable[torch.device]) -> str:
    return " and ".join(sorted(str(device) for device in devices))
