"""What CUDA takes: no false alarm, the right devices, the CPU's values, and the counts that a GPU would show."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.pretend.device import pretended_gpus
from tests.pretend.report import Report
from tests.ranks import run_ranks

GPU = "cuda"


def test_devices_are_answered_as_by_a_gpu() -> None:
    with pretended_gpus(num_gpus=2):
        x, host = torch.zeros(3, device=GPU), torch.zeros(3)
        assert (x.device, x.is_cuda, x.is_cpu, x.get_device()) == (torch.device("cuda:0"), True, False, 0)
        assert (host.device, host.is_cuda, host.get_device()) == (torch.device("cpu"), False, -1)
        assert (x.type(), x.bfloat16().type()) == ("torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor")
        torch.cuda.set_device(1)
        for made in (
            torch.zeros(3, device=torch.cuda.current_device()),
            torch.tensor([1.0], device=GPU),
            torch.as_tensor([1.0], device=GPU),
            host.to(GPU),
            host.cuda(),
            host.to(torch.zeros(1, dtype=torch.long, device=GPU)),
            torch.zeros_like(host, device=GPU),
            torch.nn.Linear(2, 2).cuda().weight,
        ):
            assert made.device == torch.device("cuda:1")
        with torch.device(GPU):
            assert torch.arange(3).is_cuda
        for made in (x.cpu(), torch.zeros_like(x, device="cpu"), x.to("cpu", torch.float64), torch.tensor([1.0])):
            assert not made.is_cuda
        with torch.device("meta"):
            assert {torch.tensor([]).device.type, torch.empty(2).device.type} == {"meta"}
        assert torch.empty_like(torch.empty(2, device="meta"), device=GPU).is_cuda
        for derived in (x[1:], x.view(3, 1), x.new_zeros(2), x + 1, x.half(), copy.deepcopy(x), x.detach(), x.double()):
            assert derived.device == x.device
    assert not torch.zeros(3).is_cuda
    assert not torch.cuda.is_available()


def test_torch_cuda_answers() -> None:
    with pretended_gpus(num_gpus=2):
        assert (torch.cuda.is_available(), torch.cuda.device_count(), torch.cuda.current_device()) == (True, 2, 0)
        ids = {str(torch.cuda.get_device_properties(i).uuid) for i in range(2)}
        assert len(ids) == 2
        with torch.cuda.device(1):
            assert torch.zeros(1, device=GPU).get_device() == 1
        free, total = torch.cuda.mem_get_info()
        assert 0 < free <= total
        torch.cuda.reset_peak_memory_stats()
        assert torch.cuda.memory_allocated() == torch.cuda.max_memory_allocated() == 0
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.zeros(3, device=GPU)
        end.record()
        assert start.elapsed_time(end) >= 0
        torch.cuda.current_stream().wait_stream(torch.cuda.Stream())
        assert torch.cuda.get_device_capability() >= (8, 0)
        torch.cuda.manual_seed(3)
        state = torch.cuda.get_rng_state()
        first = torch.rand(2, device=GPU)
        torch.cuda.set_rng_state(state)
        assert torch.equal(first, torch.rand(2, device=GPU))
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cuda.matmul.allow_tf32 = False
        assert isinstance(torch.backends.cuda.flash_sdp_enabled(), bool)
        torch.cuda.empty_cache()


def scalars(device: str) -> Tensor:
    """A CPU scalar beside a tensor on a GPU becomes an argument of the kernel."""
    x, half = torch.arange(6.0, device=device).view(2, 3), torch.tensor(0.5)
    y = x * half + torch.tensor(2.0) - half / (x + 1)
    y = torch.where(y > half, y, half).maximum(half) + torch.where(y > 1, y, 0.0)
    y = torch.where(y.isfinite(), y, float("nan")).masked_fill(x > 4, half)
    y.add_(half)
    y[0, 1] = 5.0
    y[1] = half
    return torch.lerp(y, x, 0.25)


def indices(device: str) -> Tensor:
    x = torch.arange(12.0, device=device).view(3, 4)
    x[[0, 2], [1, 1]] = 0.0
    x[torch.tensor([1]), torch.tensor([0])] = -1.0
    x[x > 10] = 0.5
    x[torch.tensor([2, 0], device=device)] += torch.ones(4, device=device)
    return torch.cat([x[[0, 1]], x[torch.tensor([2])], x[x[:, 0] < 0], x[:, [3, 0, 1, 2]]])


def copies(device: str) -> Tensor:
    host, x = torch.arange(4.0), torch.empty(4, device=device)
    x.copy_(host)
    host.copy_(x * 2)
    x.copy_(host[0])
    torch._foreach_copy_([x], [host])
    return x + host.to(device, non_blocking=True) + host.to(device, torch.float64).float()


def gradients(device: str) -> Tensor:
    weight = torch.linspace(-1, 1, 12).view(3, 4).to(device).requires_grad_()
    table = torch.linspace(0, 1, 10, device=device).view(5, 2).requires_grad_()
    host = torch.ones(4, requires_grad=True)
    rows = torch.tensor([0, 2, 0], device=device)
    put = torch.zeros(3, 4, device=device).index_put((rows,), weight, accumulate=True)
    loss = (put * host.to(device)).square().sum() + torch.nn.functional.embedding(rows, table).sum()
    loss = loss + checkpoint(lambda w: torch.nn.functional.silu(w @ w.T).sum(), weight, use_reentrant=False)
    loss = loss + checkpoint(lambda w: torch.nn.functional.rms_norm(w, (4,)).exp().sum(), weight, use_reentrant=True)
    loss = loss + torch.nn.functional.cross_entropy(weight, rows) + weight.std() + weight.logsumexp(0).max()
    loss.backward()
    for leaf in (weight, table, host):
        assert leaf.grad is not None
        assert leaf.grad.device == leaf.device
    second = torch.autograd.grad(weight.pow(3).sum(), weight, create_graph=True)[0].sum()
    return torch.cat([weight.grad.flatten(), table.grad.flatten(), host.grad.to(device), second[None]])  # type: ignore[union-attr]


class _TwoOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, x * 3

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 2 + grads[1] * 3


def unused_output(device: str) -> Tensor:
    """The engine makes the gradient of an output that nothing read, as zeros beside it."""
    x = torch.arange(3.0, device=device).requires_grad_()
    _TwoOutputs.apply(x)[1].sum().backward()
    assert x.grad is not None
    return x.grad


def attention(device: str) -> Tensor:
    query = torch.linspace(-1, 1, 64, device=device).view(1, 4, 4, 4).requires_grad_()
    key = torch.linspace(1, -1, 32, device=device).view(1, 2, 4, 4)
    mask = torch.ones(4, 4, dtype=torch.bool, device=device).tril()
    first = torch.nn.functional.scaled_dot_product_attention(query, key, key, attn_mask=mask, enable_gqa=True)
    second = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    (first + second).square().sum().backward()
    assert query.grad is not None
    return query.grad


def optimizers(device: str) -> Tensor:
    found = []
    for kind in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD):
        layer = torch.nn.Linear(3, 2)
        torch.nn.init.constant_(layer.weight, 0.5)
        torch.nn.init.constant_(layer.bias, 0.1)
        layer.to(device)
        optimizer = kind(layer.parameters(), lr=0.1, foreach=True)
        for _ in range(2):
            optimizer.zero_grad()
            layer(torch.ones(4, 3, device=device)).square().sum().backward()
            torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
            optimizer.step()
        found += [p.detach().flatten() for p in layer.parameters()]
    return torch.cat(found)


def fused_optimizer(device: str) -> Tensor:
    parameter = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    for _ in range(2):
        parameter.grad = torch.full_like(parameter, 0.5)
        optimizer.step()
    return parameter.detach()


def many_functions(device: str) -> Tensor:
    x = torch.linspace(-2, 2, 12, device=device).view(3, 4)
    hot = torch.nn.functional.one_hot(torch.tensor([0, 3, 1], device=device), 4)
    padded = torch.nn.functional.pad(x, (0, 2), value=1.0)
    sorted_x, order = x.sort(descending=True)
    kept = sorted_x.softmax(-1).cumsum(-1) < 0.9
    back = torch.zeros_like(x).scatter(1, order, sorted_x * kept)
    spread = torch.repeat_interleave(x, 2, dim=0, output_size=6)[::2]
    parts = torch.einsum("ij,kj->ik", x, x) + torch.stack([x[:, 0], x[:, 1], x[:, 2]])
    edges = torch.bucketize(x, torch.tensor([0.0, 1.0], device=device))
    return torch.cat([hot * x, padded[:, 2:], back, spread, parts, edges, x.topk(3).values.float()], dim=1)


PATHS = [
    scalars,
    indices,
    copies,
    gradients,
    unused_output,
    attention,
    optimizers,
    fused_optimizer,
    many_functions,
]


@pytest.mark.parametrize("path", PATHS)
def test_no_false_alarm_and_the_same_values(path: Callable[[str], Tensor]) -> None:
    expected = path("cpu")
    with pretended_gpus():
        found = path(GPU)
        assert found.is_cuda
        found = found.cpu()
    assert torch.equal(found, expected)


def test_gradients_of_a_plain_cpu_graph_stay_there() -> None:
    with pretended_gpus():
        x = torch.ones(3, requires_grad=True)
        _TwoOutputs.apply(x)[0].sum().backward()
        assert x.grad is not None
        assert not x.grad.is_cuda


def _collectives() -> list[float]:
    """What a rank does; with the backends that the layout asks for on a GPU."""
    with pretended_gpus():
        rank, world_size = int(os.environ["RANK"]), 2
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
        group: Any = dist.new_group([0, 1], backend="nccl")
        x = torch.full((4,), rank + 1.0, device=device)
        dist.all_reduce(x, group=group)
        parts = [torch.empty_like(x) for _ in range(world_size)]
        dist.all_gather(parts, x * (rank + 1), group=group)
        whole = torch.empty(8, device=device)
        dist.all_gather_into_tensor(whole, x, group=group)
        share = torch.empty(2, device=device)
        dist.reduce_scatter_tensor(share, torch.cat(parts)[:4], group=group)
        dist.broadcast(share, src=0, group=group)
        box = [rank]
        dist.broadcast_object_list(box, src=0, device=device)
        gathered = [None, None]
        dist.all_gather_object(gathered, rank)
        beside = torch.zeros(2)
        dist.all_reduce(beside)
        if rank:
            dist.send(share, dst=0)
        else:
            dist.recv(share, src=1)
        assert all(t.device == device for t in (x, *parts, whole, share))
        assert not beside.is_cuda
        return [*x.tolist(), *torch.cat(parts).tolist(), *whole.tolist(), *share.tolist(), *box]


def test_collectives_over_gloo() -> None:
    first, second = run_ranks(_collectives, 2)
    assert first[:4] == [3.0] * 4
    assert first == second


def _id_of_gpu() -> tuple[int, str]:
    with pretended_gpus():
        return torch.cuda.device_count(), str(torch.cuda.get_device_properties(int(os.environ["LOCAL_RANK"])).uuid)


def test_each_rank_has_a_gpu_of_its_own() -> None:
    (count, first), (_, second) = run_ranks(_id_of_gpu, 2)
    assert count == 2
    assert first != second


def _counts(act: Callable[[], Any]) -> Report:
    with pretended_gpus() as report:
        act()
    return report


def read_in_a_loop() -> float:
    x, total = torch.arange(5.0, device=GPU), 0.0
    for i in range(5):
        total += float(x[i])  # the line
    return total


def test_a_read_in_a_loop_is_counted_at_its_line() -> None:
    report = _counts(read_in_a_loop)
    ((sync, count),) = report.syncs.items()
    first = read_in_a_loop.__code__.co_firstlineno
    assert (sync.kind, count) == ("value", 5)
    assert sync.line.function == "tests/pretend/test_clean_paths.py:read_in_a_loop"
    assert sync.line.number == f"tests/pretend/test_clean_paths.py:{first + 3}"


SYNCS: list[tuple[str, int]] = [
    ("x.sum().item()", 1),
    ("bool(x.any())", 1),
    ("x.tolist()", 1),
    ("x.cpu()", 1),
    ("x.to('cpu', non_blocking=True)", 0),
    ("torch.ones(3).to('cuda')", 1),
    ("torch.ones(3).pin_memory().to('cuda', non_blocking=True)", 0),
    ("torch.tensor([1.0], device='cuda')", 1),
    ("torch.tensor([float(v) for v in x], device='cuda')", 5),
    ("torch.tensor(list(x))", 4),
    ("torch.full((2,), 1.0, device='cuda')", 0),
    ("x.nonzero()", 1),
    ("x[x > 0]", 1),
    ("x.masked_fill_(x > 0, 1.0)", 0),
    ("x.__setitem__(x > 0, 1.0)", 0),
    ("x.__setitem__(0, 1.0)", 0),
    ("x.__setitem__([0, 1], 1.0)", 1),
    ("x[torch.tensor([0])]", 1),
    ("x + torch.tensor(1.0)", 0),
    ("torch.where(x > 0, x, 0.0)", 0),
    ("torch.where(x > 0, x, torch.tensor(0.0))", 1),
    ("torch.equal(x, x)", 1),
    ("torch.ones(4).copy_(x)", 1),
    ("x.cumsum(0).softmax(0)", 0),
    ("torch.cuda.synchronize()", 1),
    ("torch.repeat_interleave(x, torch.ones(4, dtype=torch.long, device='cuda'))", 1),
    ("torch.repeat_interleave(x, torch.ones(4, dtype=torch.long, device='cuda'), output_size=4)", 0),
]


@pytest.mark.parametrize(("expression", "count"), SYNCS)
def test_host_synchronisations(expression: str, count: int) -> None:
    with pretended_gpus() as report:
        x = torch.arange(4.0).add(0).to(GPU)
        before = report.num_syncs
        eval(expression, {"torch": torch, "x": x})
        assert report.num_syncs - before == count, report.syncs


def test_launches_are_about_the_kernels() -> None:
    with pretended_gpus() as report:
        x = torch.zeros(4, 4, device=GPU)
        before = report.num_launches
        (x @ x + 1).t().reshape(16).view(2, 8)[0].relu()
        assert report.num_launches - before == 4, report.launches  # product, sum, a copy for the new shape, relu
        assert {line.function for _, line in report.launches} == {
            "tests/pretend/test_clean_paths.py:test_launches_are_about_the_kernels"
        }
