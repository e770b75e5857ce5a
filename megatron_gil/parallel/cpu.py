"""Running megatron.core on the CPU.

What the library computes does not need CUDA; its source only names the device `cuda`. Where there is no GPU, each
megatron.core module that holds the name `torch` is given a stand-in for it, in which `cuda` reads as the CPU.
Nothing outside megatron.core changes, except two methods of torch.Tensor: they are called on tensors, which a
stand-in module does not reach."""

from __future__ import annotations

import functools
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

# What the engine uses of megatron.core; imported before its modules are searched for the name `torch`.
_PACKAGES = (
    "megatron.core.distributed",
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
)

# pipeline_parallel/schedules.py:596, 983 and 2138 (zeros), transformer/utils.py:35 and 40 (ones),
# optimizer/clip_grads.py:176 and utils.py:1207 (zeros, tensor): device="cuda".
_CREATION_FUNCTIONS = ("arange", "empty", "full", "ones", "tensor", "zeros")

_CPU = torch.device("cpu")


def import_core() -> None:
    """Import megatron.core; where there is no CUDA, without torch's compiler, which is half of the time it takes.

    megatron/core/jit.py makes torch.compile the decorator of its fusions, and to decorate is to load the compiler.
    Without CUDA models/kernels.py chooses no fusion, and these functions stay as they are written.
    """
    compiler = torch.compile
    if not torch.cuda.is_available():
        torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        for name in _PACKAGES:
            importlib.import_module(name)
    finally:
        torch.compile = compiler


def install_cpu_shim() -> None:
    """Make megatron.core run on the CPU; does nothing where CUDA is available. May be called again."""
    import_core()
    if torch.cuda.is_available():
        return
    stand_in = _torch_on_cpu()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and vars(module).get("torch") is torch:
            vars(module)["torch"] = stand_in
    _answer_rng_state()
    _answer_tensor_methods()


def _torch_on_cpu() -> types.ModuleType:
    stand_in = _copy_module(torch)
    cuda = _copy_module(torch.cuda)
    # layers.py:277, mappings.py:91, p2p_communication.py:190, attention.py:430 and many more: device=current_device()
    vars(cuda)["current_device"] = lambda: _CPU
    # p2p_communication.py:398 after every exchange, distributed_data_parallel.py:588
    vars(cuda)["synchronize"] = lambda device=None: None
    # 0.19.2, param_and_grad_buffer.py:632 before every sum of gradients; asked to wait for CUDA graphs alone
    vars(cuda)["current_stream"] = lambda device=None: None
    # tensor_parallel/random.py:235-238 and 422: the tracker's streams
    vars(cuda)["get_rng_state"] = lambda device=None: torch.get_rng_state()
    vars(cuda)["manual_seed"] = torch.manual_seed
    vars(stand_in)["cuda"] = cuda
    for name in _CREATION_FUNCTIONS:
        vars(stand_in)[name] = _read_cuda_as_cpu(getattr(torch, name))
    return stand_in


def _copy_module(module: types.ModuleType) -> types.ModuleType:
    """A module with the same names; a name that the original makes on demand is looked up in the original."""
    copy = types.ModuleType(module.__name__, module.__doc__)
    vars(copy).update(vars(module))
    vars(copy)["__getattr__"] = functools.partial(getattr, module)
    return copy


def _read_cuda_as_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def create(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = _CPU
        return function(*args, **kwargs)

    return create


def _answer_rng_state() -> None:
    # tensor_parallel/random.py:41 and 75 reach CUDA's generators through torch._C, past the stand-in.
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda device=None, clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)


def _answer_tensor_methods() -> None:
    if getattr(torch.Tensor.type, "answers_megatron", False):
        return
    # language_module.py:244 (tied embeddings under pipeline parallelism), optimizer.py:375, grad_scaler.py:140
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    type_of = torch.Tensor.type

    @functools.wraps(type_of)
    def answer(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = type_of(self, *args, **kwargs)
        if args or kwargs or not sys._getframe(1).f_globals["__name__"].startswith("megatron.core"):
            return name
        # clip_grads.py:167, optimizer.py:671-690 and distrib_optimizer.py:361-420 accept torch.cuda.FloatTensor,
        # HalfTensor and BFloat16Tensor. float64 is not among them, though their code is right for it.
        return name.replace("torch.", "torch.cuda.").replace("DoubleTensor", "FloatTensor")

    answer.answers_megatron = True  # type: ignore[attr-defined]
    torch.Tensor.type = answer
