"""Mistakes with devices that CUDA refuses, planted; the pretended GPU must refuse each too, and name its line."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.pretend.device import pretended_gpus
from tests.pretend.places import DeviceMistake
from tests.pretend.rules import NOT_DETERMINISTIC, documented_as_refused

GPU = "cuda"


def on_gpu(*shape: int) -> Tensor:
    return torch.randn(shape, device=GPU)


def mask_on_cpu() -> None:
    scores = on_gpu(2, 4, 4)
    scores.masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), float("-inf"))


def attention_mask_on_cpu() -> None:
    query = on_gpu(1, 2, 4, 8)
    torch.nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=torch.zeros(4, 4))


def gather_index_on_cpu() -> None:
    on_gpu(3, 5).gather(1, torch.zeros(3, 1, dtype=torch.long))


def token_ids_on_cpu() -> None:
    torch.nn.functional.embedding(torch.zeros(4, dtype=torch.long), on_gpu(7, 3))


def index_on_gpu_into_cpu() -> None:
    _ = torch.randn(5)[torch.zeros(2, dtype=torch.long, device=GPU)]


def put_values_from_cpu() -> None:
    on_gpu(4)[torch.tensor([0, 1], device=GPU)] = torch.ones(2)


class _CpuGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * torch.linspace(0.0, 1.0, len(x))  # the device is forgotten


def custom_backward() -> None:
    _CpuGradient.apply(on_gpu(3).requires_grad_()).sum().backward()


def custom_backward_of_autograd_grad() -> None:
    x = on_gpu(3).requires_grad_()
    torch.autograd.grad(_CpuGradient.apply(x).sum(), x)


def kl_weights_on_cpu() -> None:
    log_ratio, kl_weights = on_gpu(4, 6), torch.full((4,), 0.05)
    (kl_weights[:, None] * log_ratio).sum()


def numpy_of_gpu() -> None:
    on_gpu(3).numpy()


def numpy_asarray_of_gpu() -> None:
    import numpy as np

    np.asarray(on_gpu(3))


def parameter_on_cpu() -> None:
    norm = torch.nn.RMSNorm(4)
    norm(on_gpu(2, 4))


def bias_on_cpu() -> None:
    layer = torch.nn.Linear(4, 3, device=GPU)
    layer.bias = torch.nn.Parameter(torch.zeros(3))
    layer(on_gpu(2, 4))


def result_in_place_on_cpu() -> None:
    torch.zeros(3).add_(on_gpu(3))


def scalar_result_in_place_on_cpu() -> None:
    torch.zeros(()).add_(on_gpu(3).sum())


def result_by_out_on_cpu() -> None:
    x = on_gpu(3)
    torch.add(x, x, out=torch.empty(3))


def wide_cpu_beside_gpu_scalar() -> None:
    _ = torch.ones(3) * on_gpu()


def cat_of_both() -> None:
    torch.cat([on_gpu(2), torch.ones(1)])


def stack_of_scalars_of_both() -> None:
    torch.stack([on_gpu(), torch.zeros(())])


def matrix_product_of_both() -> None:
    _ = on_gpu(3, 4) @ torch.ones(4, 2)


def two_cpu_scalars() -> None:
    torch.addcmul(on_gpu(3), torch.tensor(0.5), torch.tensor(2.0))


def fused_step_on_cpu() -> None:
    parameter = torch.nn.Parameter(on_gpu(3))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    parameter.grad = on_gpu(3)
    optimizer.step()
    optimizer.state[parameter]["step"] = torch.tensor(1.0)
    optimizer.step()


def clamp_to_cpu_scalar() -> None:
    on_gpu(3).clamp(min=torch.tensor(0.5))


def cpu_gradient_given() -> None:
    on_gpu(3).requires_grad_().exp().backward(torch.ones(3))


def optimizer_state_on_cpu() -> None:
    torch._foreach_lerp_([on_gpu(3), on_gpu(2)], [torch.ones(3), torch.ones(2)], 0.1)


def another_gpu() -> None:
    _ = on_gpu(3) + torch.zeros(3, device="cuda:1")


def gpu_that_is_not_there() -> None:
    torch.zeros(3, device="cuda:2")


def generator_of_cpu() -> None:
    torch.rand(3, device=GPU, generator=torch.Generator())


def pinned_gpu_memory() -> None:
    on_gpu(3).pin_memory()


MISTAKES: list[tuple[Callable[[], None], str]] = [
    (mask_on_cpu, "cuda:0 and a tensor [4, 4] on cpu"),
    (attention_mask_on_cpu, "same device"),
    (gather_index_on_cpu, "cpu and cuda:0"),
    (token_ids_on_cpu, "cpu and cuda:0"),
    (index_on_gpu_into_cpu, "indices on cuda:0 into a tensor on cpu"),
    (put_values_from_cpu, "values from another device than cuda:0"),
    (custom_backward, "a tensor [3] on cpu"),
    (custom_backward_of_autograd_grad, "a tensor [3] on cpu"),
    (kl_weights_on_cpu, "a tensor [4, 1] on cpu"),
    (numpy_of_gpu, "can't take the memory of a cuda:0"),
    (numpy_asarray_of_gpu, "can't take the memory of a cuda:0"),
    (parameter_on_cpu, "a tensor [4] on cpu"),
    (bias_on_cpu, "cpu and cuda:0"),
    (result_in_place_on_cpu, "which is to hold the result"),
    (scalar_result_in_place_on_cpu, "which is to hold the result"),
    (result_by_out_on_cpu, "which is to hold the result"),
    (wide_cpu_beside_gpu_scalar, "a tensor [3] on cpu"),
    (cat_of_both, "cpu and cuda:0"),
    (stack_of_scalars_of_both, "cpu and cuda:0"),
    (matrix_product_of_both, "cpu and cuda:0"),
    (two_cpu_scalars, "2 scalar tensors on cpu"),
    (fused_step_on_cpu, "cpu and cuda:0"),
    (clamp_to_cpu_scalar, "cpu and cuda:0"),
    (cpu_gradient_given, "same device"),
    (optimizer_state_on_cpu, "a tensor [3] on cpu"),
    (another_gpu, "cuda:0 and cuda:1"),
    (gpu_that_is_not_there, "invalid device ordinal"),
    (generator_of_cpu, "generator"),
    (pinned_gpu_memory, "can't take the memory"),
]


@pytest.mark.parametrize(("mistake", "said"), MISTAKES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_planted_mistake_is_refused(mistake: Callable[[], None], said: str) -> None:
    with pretended_gpus(num_gpus=2), pytest.raises(DeviceMistake, match=re.escape(said)) as raised:
        mistake()
    if mistake is not gpu_that_is_not_there:
        assert re.search(r"tests/pretend/test_mistakes\.py:\d+\)", str(raised.value)), "it names the line"


def cumsum() -> None:
    on_gpu(3).cumsum(0)


def cumsum_in_backward() -> None:
    on_gpu(3).requires_grad_().logcumsumexp(0)  # itself not listed
    torch.ones(3, device=GPU).cumsum_(0)


def put() -> None:
    on_gpu(3).put_(torch.tensor([0], device=GPU), torch.ones(1, device=GPU))


def histogram() -> None:
    torch.histc(on_gpu(5), 3)


def weighted_bincount() -> None:
    torch.bincount(torch.tensor([0, 1], device=GPU), weights=on_gpu(2))


def median_with_index() -> None:
    on_gpu(3, 4).median(dim=1)


def largest_product() -> None:
    on_gpu(3).scatter_reduce(0, torch.zeros(2, dtype=torch.long, device=GPU), on_gpu(2), reduce="prod")


def pooled_gradient() -> None:
    torch.nn.functional.adaptive_avg_pool2d(on_gpu(1, 1, 4, 4).requires_grad_(), 2).sum().backward()


def resized_gradient() -> None:
    image = on_gpu(1, 1, 4).requires_grad_()
    torch.nn.functional.interpolate(image, scale_factor=2.0, mode="linear").sum().backward()


NOT_DETERMINISTIC_CALLS = [
    cumsum,
    cumsum_in_backward,
    put,
    histogram,
    weighted_bincount,
    median_with_index,
    largest_product,
    pooled_gradient,
    resized_gradient,
]


@pytest.fixture
def deterministic() -> Any:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("call", NOT_DETERMINISTIC_CALLS)
def test_deterministic_mode_refuses_what_cuda_has_no_such_kernel_for(call: Callable[[], None]) -> None:
    with pretended_gpus():
        call()  # fine otherwise
    try:
        torch.use_deterministic_algorithms(True)
        with pretended_gpus(), pytest.raises(DeviceMistake, match="does not have a deterministic implementation"):
            call()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_deterministic_mode_takes_what_cuda_makes_deterministic() -> None:
    with pretended_gpus():
        index = torch.zeros(3, dtype=torch.long, device=GPU)
        on_gpu(4).scatter_add(0, index, on_gpu(3))
        on_gpu(4).index_put_((index,), on_gpu(3), accumulate=True)
        on_gpu(4).index_add(0, index, on_gpu(3))
        on_gpu(4).requires_grad_()[index].sum().backward()
        on_gpu(2, 4).requires_grad_().gather(1, index[:2, None]).sum().backward()
        torch.nn.functional.embedding(index, on_gpu(5, 2).requires_grad_()).sum().backward()
        torch.ones(3, dtype=torch.long, device=GPU).cumsum(0)
        torch.bincount(index)
    torch.ones(3).cumsum(0)  # on the CPU it is


def test_every_operation_that_torch_documents_as_refused_has_a_rule() -> None:
    documented = documented_as_refused()
    assert documented >= {"torch.cumsum", "torch.Tensor.put_", "torch.nn.CTCLoss"}
    assert documented <= set(NOT_DETERMINISTIC)
