"""Every function of algo, on inputs made from its own annotations: what comes out has the annotated shape, and float32
stays float32, float64 stays float64."""

import inspect
from typing import Any, get_args, get_type_hints

import jaxtyping
import pytest
import torch

from megatron_gil.algo import advantages, groups, kl, likelihood, masked, ppo, preference
from megatron_gil.types import AllSum, GroupStats, LossSum

FUNCTIONS = [
    function
    for module in (advantages, groups, kl, likelihood, masked, ppo, preference)
    for name, function in vars(module).items()
    if inspect.isfunction(function) and function.__module__ == module.__name__ and not name.startswith("_")
]
SIZES = {"batch": 6, "pos": 5, "group": 3, "2": 2, "*shape": 4}
STATISTICS = {"masked_mean", "explained_variance"}  # float64 whatever comes in


def argument(hint, dtype):
    if hint is float:
        return 0.5
    if hint is int:
        return 2
    if hint == AllSum:
        return torch.clone
    if hint is GroupStats:
        return groups.group_statistics(torch.full((6, 3), 1 / 3), torch.arange(6.0), all_sum=torch.clone)
    x = torch.rand([SIZES[name] for name in hint.dim_str.split()], generator=torch.Generator().manual_seed(0))
    return x < 0.7 if hint.dtype is jaxtyping.Bool else x.to(dtype)


def fits(value: torch.Tensor, hint: Any) -> bool:
    return isinstance(value, hint)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_shapes_and_dtypes(function, dtype):
    hints = get_type_hints(function)
    required = [name for name, p in inspect.signature(function).parameters.items() if p.default is p.empty]
    with jaxtyping.jaxtyped("context"):
        given = {name: argument(hints[name], dtype) for name in required}
        for name, value in given.items():  # binds batch, pos, ... to the sizes at hand
            assert not isinstance(value, torch.Tensor) or fits(value, hints[name])
        result = function(**given)
        if hints["return"] is GroupStats:
            assert (result.mass.dtype, result.group_return.dtype) == (torch.float64, torch.float64)
            assert result.mass.shape == result.group_return.shape == result.counts.shape == (3,)
            return
        if hints["return"] is LossSum:
            outputs = dict.fromkeys((result.total, *result.metrics.values()), jaxtyping.Float[torch.Tensor, ""])
        elif isinstance(result, tuple):
            outputs = dict(zip(result, get_args(hints["return"]), strict=True))
        else:
            outputs = {result: hints["return"]}
        for tensor, hint in outputs.items():
            assert fits(tensor, hint)
            assert tensor.dtype == (torch.float64 if function.__name__ in STATISTICS else dtype)
            assert tensor.isfinite().all()
