"""The optimizer of one model: megatron-core's, a stateless learning-rate schedule, and Adam's state by parameter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_gil.config import OptimizerSection
from megatron_gil.engine.offload import HostCopies

MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(section: OptimizerSection, *, update: int, num_updates: int) -> float:
    """The rate of update number `update` (from 0) of `num_updates`: linear warm-up, then the schedule's decay.

    A pure function of the update's number, so that a resumed run needs no scheduler state.
    """
    warmup = round(section.warmup_fraction * num_updates)
    if update < warmup:
        return section.lr * (update + 1) / warmup
    progress = min(1.0, (update - warmup) / max(1, num_updates - warmup))
    decay = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return section.min_lr + (section.lr - section.min_lr) * decay[section.schedule]


@dataclass(frozen=True, slots=True)
class Fragment:
    """The part of a parameter whose optimizer state this rank holds: [start, end) of the flattened local parameter."""

    name: str
    param: torch.nn.Parameter
    start: int
    end: int
    sharded: bool  # other data-parallel ranks hold the rest
    mixed: bool  # there are float32 master weights apart from the model's own
    main: Tensor | None  # the master weights of the part
    state: dict[str, Any] | None  # Adam's, to be read and written in place; None on a rank that holds no part


class ModelOptimizer:
    """Steps one model; knows where megatron-core keeps what a checkpoint must hold."""

    def __init__(self, ddp: DistributedDataParallel, section: OptimizerSection, *, dtype: torch.dtype) -> None:
        self._section = section
        self._mixed = dtype == torch.bfloat16
        self._distributed = ddp.ddp_config.use_distributed_optimizer
        self._ddp = ddp
        config = OptimizerConfig(
            optimizer="adam",
            lr=section.lr,
            weight_decay=section.weight_decay,
            adam_beta1=section.beta1,
            adam_beta2=section.beta2,
            adam_eps=section.eps,
            clip_grad=section.clip_grad,
            bf16=self._mixed,
            params_dtype=dtype,
            use_distributed_optimizer=self._distributed,
        )
        self._optimizer: Any = get_megatron_optimizer(config, [ddp], use_gloo_process_groups=False)  # ChainedOptimizer
        self._device = next(ddp.parameters()).device
        self._host_copies: HostCopies | None = None
        self._fuse()

    def _fuse(self) -> None:
        """Let torch's AdamW update with fused kernels and count its steps on the device. The Adam of Transformer Engine
        or Apex, which megatron-core takes where it finds one, is fused already."""
        for part in self._optimizer.chained_optimizers:
            if isinstance(part.optimizer, torch.optim.AdamW):
                for group in part.optimizer.param_groups:
                    group["fused"] = True

    @property
    def kind(self) -> str:
        """Which Adam it is, for the first lines of a run."""
        inner = next((p.optimizer for p in self._optimizer.chained_optimizers if p.optimizer is not None), None)
        name = "no parameters" if inner is None else f"{type(inner).__module__.split('.')[0]} {type(inner).__name__}"
        fused = inner is not None and _is_torch(inner) and any(group["fused"] for group in inner.param_groups)
        sharded = ", sharded over data-parallel ranks" if self._distributed else ""
        return f"{name}{', fused' if fused else ''}{sharded}"

    def step(self, lr: float) -> tuple[bool, float]:
        """(took the step, global gradient norm before clipping); with a norm that is not finite no rank steps."""
        self._restore()
        self._optimizer.prepare_grads()
        norm = self._gradient_norm()
        if not math.isfinite(norm):
            return False, norm
        for part in self._optimizer.chained_optimizers:
            if self._section.clip_grad > 0 and part.get_parameters():
                clip_grad_by_total_norm_fp32(part.get_parameters(), self._section.clip_grad, norm)
            for group in part.param_groups:
                group["lr"] = lr
                # wd_mult: 0 for norms, 1 for matrices. megatron-core's scheduler would multiply by it; we use none.
                group["weight_decay"] = self._section.weight_decay * group["wd_mult"]
        self._optimizer.step_with_ready_grads()
        return True, norm

    def _gradient_norm(self) -> float:
        """Over all parameters and model-parallel ranks, read by the host once: megatron-core's own, where neither Apex
        nor Transformer Engine is installed, reads one number for every parameter."""
        grads = [g for part in self._optimizer.chained_optimizers for g in _grads_of_norm(part)]
        norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros((), device=self._device)
        squared = norm.float().square()
        dist.all_reduce(squared, group=self._optimizer.get_grad_stats_parallel_group())
        return squared.item() ** 0.5

    def offload(self) -> None:
        """Let Adam's moments, and the master weights where there are any, wait in host memory until they are next
        needed."""
        self._host_copies = self._host_copies or HostCopies(self._state_tensors())
        self._host_copies.offload()

    @property
    def host_bytes(self) -> int:
        return self._host_copies.num_bytes if self._host_copies is not None else 0

    def _restore(self) -> None:
        if self._host_copies is not None:
            self._host_copies.restore()

    def _state_tensors(self) -> list[Tensor]:
        """All that is not the model's: in float32 the optimizer's parameters are the model's own weights."""
        weights = {param.untyped_storage().data_ptr() for param in self._ddp.parameters()}
        found: list[Tensor] = []
        for part in self._optimizer.chained_optimizers:
            self._create_state(part)
            if part.optimizer is None:
                continue
            for group in part.optimizer.param_groups:
                for param in group["params"]:
                    found += [param, *(part.optimizer.state[param][key] for key in MOMENTS)]
        return [tensor for tensor in found if tensor.untyped_storage().data_ptr() not in weights]

    def fragments(self) -> Iterator[Fragment]:
        """One per parameter of this rank, in the model's order; the state is created where there is none yet, and comes
        back from the host until `offload` is called again."""
        self._restore()
        for part in self._optimizer.chained_optimizers:
            self._create_state(part)
        for name, param in self._ddp.module.named_parameters():
            if not param.requires_grad:
                continue
            for part in self._optimizer.chained_optimizers:
                fragment = self._fragment(part, name, param)
                if fragment is not None:
                    yield fragment

    def _fragment(self, part: Any, name: str, param: torch.nn.Parameter) -> Fragment | None:
        if isinstance(part, DistributedOptimizer):
            if param not in part.model_param_group_index_map:
                return Fragment(name, param, 0, 0, True, self._mixed, None, None)
            where = part._get_model_param_range_map(param)["param"]
            group, order = part.model_param_group_index_map[param]
            main = part.optimizer.param_groups[group]["params"][order]
            state = part.optimizer.state[main]
            return Fragment(
                name, param, where.start, where.end, True, self._mixed, main if self._mixed else None, state
            )
        main = getattr(param, "main_param", None) if self._mixed else param
        assert main is not None, f"megatron-core keeps no main_param for {name}"
        state = part.optimizer.state[main]
        return Fragment(name, param, 0, param.numel(), False, self._mixed, main if self._mixed else None, state)

    @staticmethod
    def _create_state(part: Any) -> None:
        """Adam's state as its first step makes it; torch keeps `step` per parameter, TE and Apex per group."""
        if part.optimizer is None:
            return
        for group in part.optimizer.param_groups:
            for param in group["params"]:
                state = part.optimizer.state[param]
                if not state:
                    if _is_torch(part.optimizer):
                        state["step"] = torch.zeros((), device=param.device if group["fused"] else None)
                    state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                    state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)

    def set_num_steps(self, num_steps: int) -> None:
        """Adam's own count of steps, for its bias correction."""
        for part in self._optimizer.chained_optimizers:
            self._create_state(part)
            if part.optimizer is None:
                continue
            for group in part.optimizer.param_groups:
                if any("step" in part.optimizer.state[p] for p in group["params"]):
                    for param in group["params"]:
                        part.optimizer.state[param]["step"].fill_(float(num_steps))
                else:
                    group["step"] = num_steps

    def reload_master_weights(self) -> None:
        """Copy the model's weights into the master weights; after weights were loaded without optimizer state."""
        self._restore()
        self._optimizer.reload_model_params()


def _grads_of_norm(part: Any) -> list[Tensor]:
    """The gradients that count in the norm, each on one rank; megatron-core 0.16 and later ones call it differently."""
    read = getattr(part, "get_grads_for_grad_norm", None) or part.get_main_grads_for_grad_norm
    return read()


def _is_torch(optimizer: Any) -> bool:
    return type(optimizer).__module__.startswith("torch.")
