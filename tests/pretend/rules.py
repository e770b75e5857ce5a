"""What CUDA takes of devices, operation by operation.

Read from torch's own sources where it has them:
- `native_functions.yaml`, which every wheel carries, says which kernels check that all tensors lie on one device and
  which leave that to TensorIterator, which takes one CPU scalar beside CUDA tensors. (torchgen can parse the file too,
  in seconds.) FakeTensor has rules as well, but lets a CPU scalar pass everywhere, and cannot hold the values that our
  loops read; `torch.cuda.set_sync_debug_mode` needs a GPU. What both know and no file says is written down here.
- the documentation of `torch.use_deterministic_algorithms` says what CUDA refuses in that mode.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torchgen

_NATIVE_FUNCTIONS = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"


class Check(Enum):
    """How an operation looks at the devices of its tensors."""

    EXACT = auto()
    """All alike, scalars too."""
    ITERATOR = auto()
    """All alike, but for one CPU scalar that is not written to."""
    SCALARS = auto()
    """As ITERATOR, with any number of scalars, which are copied to the GPU."""
    LISTS = auto()
    """All that are in lists alike; a rate beside them may lie on the CPU."""
    ROWS = auto()
    """Lists of tensors: as ITERATOR for the first of each list, the second of each, ..."""
    INDEX = auto()
    """Indices may lie on the CPU, and so may a scalar to be put; the rest alike."""
    NONE = auto()
    """Copies, and what only changes where a tensor points."""


@dataclass(frozen=True, slots=True)
class Rule:
    check: Check
    written: tuple[int | str, ...]
    """Places or names of the arguments that are written to."""
    makes: bool
    """Makes a tensor on a device that the caller names."""
    launches: bool
    syncs: bool
    """The host waits for the size or the value of the result."""


_MOVES = {"copy_", "_foreach_copy_", "set_", "resize_", "_resize_output_", "is_same_size"}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_NO_KERNEL = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"}
_NO_KERNEL |= {"set_", "resize_", "_unsafe_view", "_reshape_alias", "is_same_size", "_local_scalar_dense", "item"}
_SYNCS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique", "_unique2", "unique_consecutive"}
_SYNCS |= {"unique_dim", "bincount", "histc", "is_set_to", "_linalg_check_errors"}


@cache
def rule_of(operation: Any) -> Rule:
    """The rule of a torch._ops.OpOverload."""
    schema = operation._schema
    name, overload = schema.name.partition("::")[2], schema.overload_name
    if name in _MOVES:
        check = Check.NONE
    elif name in _INDEXED:
        check = Check.INDEX
    elif name == "where":
        check = Check.SCALARS
    elif name.startswith("_foreach"):
        check = Check.ROWS
    elif name.startswith("_fused_"):  # the optimizers' steps
        check = Check.LISTS
    elif (f"{name}.{overload}" if overload else name) in _not_checked():
        check = Check.ITERATOR
    else:
        check = Check.EXACT
    written = [argument for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    return Rule(
        check=check,
        written=tuple(a.name if a.kwarg_only else schema.arguments.index(a) for a in written),
        makes=any(argument.name == "device" for argument in schema.arguments),
        launches=name not in _NO_KERNEL,
        syncs=name in _SYNCS,
    )


@cache
def _not_checked() -> frozenset[str]:
    """Operations marked `device_check: NoCheck`."""
    found, name = set(), ""
    for line in _NATIVE_FUNCTIONS.read_text(encoding="utf-8").splitlines():
        if line.startswith("- func: "):
            name = line.removeprefix("- func: ").partition("(")[0]
        elif line.strip().startswith("device_check: NoCheck"):
            found.add(name)
    assert "add.Tensor" in found and "mm" not in found, f"{_NATIVE_FUNCTIONS} is written in another way"  # noqa: PT018
    return frozenset(found)


def is_mask_index(indices: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _always(args: Any, kwargs: Any) -> bool:
    return True


def _is_not_integral(args: Any, kwargs: Any) -> bool:
    dtype = kwargs.get("dtype") or args[0].dtype
    return dtype.is_floating_point or dtype.is_complex


def _has_weights(args: Any, kwargs: Any) -> bool:
    return (args[1] if len(args) > 1 else kwargs.get("weights")) is not None


def _is_product(args: Any, kwargs: Any) -> bool:
    return "prod" in (*args, kwargs.get("reduce"))


def _is_bag_maximum(args: Any, kwargs: Any) -> bool:
    return "max" in (*args, kwargs.get("mode")) or 2 in args[5:]


def _never(args: Any, kwargs: Any) -> bool:
    return False


Refuses = Callable[[Any, Any], bool]

NOT_DETERMINISTIC: dict[str, tuple[tuple[str, ...], Refuses]] = {
    "torch.nn.AvgPool3d": (("avg_pool3d_backward",), _always),
    "torch.nn.AdaptiveAvgPool2d": (("_adaptive_avg_pool2d_backward",), _always),
    "torch.nn.AdaptiveAvgPool3d": (("_adaptive_avg_pool3d_backward",), _always),
    "torch.nn.AdaptiveMaxPool2d": (("adaptive_max_pool2d_backward",), _always),
    "torch.nn.FractionalMaxPool2d": (("fractional_max_pool2d_backward",), _always),
    "torch.nn.FractionalMaxPool3d": (("fractional_max_pool3d_backward",), _always),
    "torch.nn.MaxPool3d": (("max_pool3d_with_indices_backward",), _always),  # of torch 2.11; not of 2.13
    "torch.nn.MaxUnpool1d": (("max_unpool2d",), _always),
    "torch.nn.MaxUnpool2d": (("max_unpool2d",), _always),
    "torch.nn.MaxUnpool3d": (("max_unpool3d",), _always),
    "torch.nn.functional.interpolate": (
        tuple(f"upsample_{kind}_backward" for kind in ("linear1d", "bilinear2d", "bicubic2d", "trilinear3d")),
        _always,
    ),
    "torch.nn.ReflectionPad1d": (("reflection_pad1d_backward",), _always),
    "torch.nn.ReflectionPad2d": (("reflection_pad2d_backward",), _always),
    "torch.nn.ReflectionPad3d": (("reflection_pad3d_backward",), _always),
    "torch.nn.NLLLoss": (("nll_loss2d_forward", "nll_loss2d_backward"), _always),
    "torch.nn.CTCLoss": (("_ctc_loss_backward",), _always),
    "torch.nn.EmbeddingBag": (("_embedding_bag_dense_backward",), _is_bag_maximum),
    "torch.Tensor.put_": (("put_",), _always),
    "torch.histc": (("histc",), _always),
    "torch.bincount": (("bincount",), _has_weights),
    "torch.median": (("median.dim", "nanmedian.dim"), _always),
    "torch.nn.functional.grid_sample": (("grid_sampler_2d_backward", "grid_sampler_3d_backward"), _always),
    "torch.cumsum": (("cumsum", "cumsum_"), _is_not_integral),
    "torch.Tensor.scatter_reduce": (("scatter_reduce", "scatter_reduce_"), _is_product),
    "torch.Tensor.resize_": (("resize_",), _never),  # of quantized tensors alone
}
"""What the documentation names -> the operations that say so on CUDA, and when."""


@cache
def documented_as_refused() -> frozenset[str]:
    """What the installed torch's documentation says that CUDA refuses in deterministic mode."""
    text = torch.use_deterministic_algorithms.__doc__ or ""
    found = re.search(r"will throw a\s+:class:`RuntimeError` when ``mode=True``:(.*?)\n    \S", text, re.DOTALL)
    assert found is not None, "the documentation of torch.use_deterministic_algorithms is written in another way"
    return frozenset(re.findall(r"\* :\w+:`~?([\w.]+)`", found[1]))


@cache
def _refusals() -> dict[str, tuple[str, Refuses]]:
    named = {name: NOT_DETERMINISTIC[name] for name in documented_as_refused() if name in NOT_DETERMINISTIC}
    return {operation: (name, refuses) for name, (group, refuses) in named.items() for operation in group}


def refused_as_nondeterministic(operation: Any, args: Any, kwargs: Any) -> str:
    """The documentation's name of an operation that CUDA refuses in deterministic mode; empty where it does not."""
    schema = operation._schema
    name = schema.name.partition("::")[2]
    found = _refusals().get(name) or _refusals().get(f"{name}.{schema.overload_name}")
    return found[0] if found and found[1](args, kwargs) else ""
