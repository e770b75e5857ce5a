"""models.offload: the memory is free while a model is idle, as planning counts it, and no number changes by a bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_gil.engine import megatron as engine
from megatron_gil.engine.generation import Generator
from megatron_gil.engine.megatron import MegatronModel, TrainableModel
from megatron_gil.engine.offload import SMALLEST_PIECE, HostCopies, _host_memory
from megatron_gil.planning import memory as m
from megatron_gil.planning.search import OFFLOADS
from megatron_gil.training.ppo.iteration import PpoTrainer
from tests.ranks import run_ranks
from tests.training.running import (
    DP2,
    ONE,
    PP2,
    TP2,
    full_weights,
    layout_name,
    make_trainer,
    parallel,
    ppo_config,
    trained_models,
    world_size,
)

NUM_ITERATIONS = 2
OWN_MODEL = {"classifier": "own_model"}
PLAIN = {"num_groups": 1}
CASES: list[tuple[dict[str, Any], dict[str, Any], torch.dtype, bool]] = [
    (ONE, PLAIN, torch.float32, False),
    (ONE, OWN_MODEL, torch.bfloat16, False),
    (TP2, {}, torch.bfloat16, False),
    (PP2, {}, torch.float32, False),
    (DP2, OWN_MODEL, torch.float32, True),
    (DP2, {}, torch.bfloat16, True),
]
"""layout, gil, dtype, distributed optimizer."""


def _storage_size(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def test_memory_goes_and_comes_back_with_its_views() -> None:
    whole = torch.arange(700_000, dtype=torch.float64)  # 5.3 MiB: pieces of 4 and 1 MiB, and what is left
    view, other = whole[3:9].view(2, 3), torch.nn.Parameter(torch.randn(5).bfloat16())
    before = whole.clone(), other.detach().clone()
    copies = HostCopies([whole, view, other, torch.empty(0)])
    assert copies.num_bytes == whole.nbytes + other.nbytes, "two views of one memory are one"
    for value in (1.0, 2.0):
        copies.offload()
        copies.offload()
        assert _storage_size(whole) == _storage_size(view) == _storage_size(other) == 0
        copies.restore()
        copies.restore()
        assert torch.equal(whole, before[0])
        assert torch.equal(other, before[1])
        assert view.tolist() == whole[3:9].view(2, 3).tolist()
        view.fill_(-value)  # what changes is copied again
        before[0][3:9] = -value


def test_what_is_constant_is_copied_once() -> None:
    weight = torch.ones(3)
    copies = HostCopies([weight], constant=True)
    copies.offload()
    with copies.restored():
        assert weight.tolist() == [1, 1, 1]
        weight.fill_(5)
    assert _storage_size(weight) == 0
    copies.restore()
    assert weight.tolist() == [1, 1, 1]
    with copies.restored():
        pass
    assert _storage_size(weight) == weight.nbytes, "it was there before"


@pytest.mark.parametrize("num_bytes", [1, 12, SMALLEST_PIECE, SMALLEST_PIECE + 1, 90_177_536, (1 << 30) - 1])
def test_pinned_memory_is_not_rounded_up_to_twice_the_size(num_bytes: int) -> None:
    memory = torch.zeros(1, dtype=torch.uint8).expand(num_bytes)
    with mock.patch("torch.empty", side_effect=lambda size, **_: size):
        sizes: Any = _host_memory(memory)
    rounded = sum(1 << (size - 1).bit_length() for size in sizes)  # as torch's host allocator does
    assert sum(sizes) == num_bytes
    assert num_bytes <= rounded < num_bytes + SMALLEST_PIECE


def _parts(model: MegatronModel) -> dict[str, int]:
    """Bytes on the device, each memory once."""

    def size(tensors: Sequence[Tensor]) -> int:
        return sum({t.untyped_storage()._cdata: _storage_size(t) for t in tensors}.values())

    weights = list(model.module.parameters())
    if not isinstance(model, TrainableModel):
        return {"weights": size(weights)}
    assert model.optimizer is not None
    buffers: Any = model.ddp.buffers  # megatron-core's, not those of torch.nn.Module
    state = model.optimizer._state_tensors() if model.optimizer._host_copies is None else []
    held = model.optimizer._host_copies
    optimizer = size(state) if held is None else size(held._memory)
    return {"weights": size(weights), "gradients": size([b.grad_data for b in buffers]), "optimizer": optimizer}


@contextmanager
def _watched(models: dict[str, MegatronModel], seen: dict[str, list[int]]) -> Iterator[None]:
    """seen: phase -> bytes of all models on the device, each time it is entered."""

    def note(phase: str) -> None:
        seen.setdefault(phase, []).append(sum(sum(_parts(model).values()) for model in models.values()))

    answer = Generator._answer

    def answer_watched(self: Generator, *args: Any) -> Any:
        note("rollout")
        return answer(self, *args)

    with mock.patch.object(Generator, "_answer", answer_watched):
        for role, model in models.items():
            model.module.register_forward_pre_hook(
                lambda module, _, role=role: note(f"{'update' if module.training else 'score'} {role}")
            )
            if isinstance(model, TrainableModel):
                inner: Any = model.optimizer and model.optimizer._optimizer
                step = inner.step_with_ready_grads
                inner.step_with_ready_grads = lambda role=role, step=step: (note(f"step {role}"), step())[1]
        yield


def _all_models(trainer: PpoTrainer) -> dict[str, MegatronModel]:
    models, scorer = trainer.models, trainer.models.scorer
    found: dict[str, Any] = {"ref_policy": models.ref_policy, "reward_model": scorer._engine}  # type: ignore[attr-defined]
    return {**trained_models(trainer), **found}


def _run(layout: dict[str, Any], gil: dict[str, Any], dtype: torch.dtype, distributed: bool, root: Path) -> Any:
    """For each setting: metrics, weights, Adam's state, and what was on the device in each phase."""
    config = ppo_config(gil=gil, ppo={"epochs": 2})
    overlap = "on" if distributed else "off"  # as on GPUs
    parallel_section = replace(config.parallel, distributed_optimizer=distributed, overlap=overlap)
    config = replace(config, parallel=parallel_section)
    engine.BUCKET_SIZE = 2000  # several sums under way at once; of this process alone
    found = {}
    with parallel(layout) as started:
        for offload in OFFLOADS:
            trainer = make_trainer(config, root, started, dtype=dtype, offload=offload)
            models, seen = _all_models(trainer), dict[str, list[int]]()
            with _watched(models, seen):
                metrics = [trainer.iterate(i) for i in range(NUM_ITERATIONS)]
            numbers = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in metrics]
            trained = trained_models(trainer)
            states = {
                f"{role}.{fragment.name}.{key}": fragment.state[key].clone()
                for role, model in trained.items()
                if model.optimizer is not None
                for fragment in model.optimizer.fragments()
                if fragment.state is not None
                for key in ("exp_avg", "exp_avg_sq", "step")
            }
            weights = {f"{r}.{n}": t for r, model in trained.items() for n, t in full_weights(model).items()}
            held = {role: _parts(model) for role, model in models.items()}
            found[offload] = numbers, {**weights, **states}, seen, held
    return found


def _name(case: tuple[dict[str, Any], dict[str, Any], torch.dtype, bool]) -> str:
    layout, gil, dtype, distributed = case
    grouping = next(iter(gil.values()), "in_critic")
    return f"{layout_name(layout)}-{grouping}-{dtype}{'-distributed' * distributed}".replace("torch.", "")


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_ppo(case: tuple[dict[str, Any], dict[str, Any], torch.dtype, bool], world: Path) -> None:
    for found in run_ranks(_run, world_size(case[0]), *case, world):
        numbers, tensors, _, held = found["none"]
        assert numbers[0] != numbers[1]
        for offload in OFFLOADS:
            assert found[offload][0] == numbers, offload
            assert found[offload][1].keys() == tensors.keys()
            differ = [name for name, tensor in found[offload][1].items() if not torch.equal(tensor, tensors[name])]
            assert not differ, offload
            check_memory(offload, found[offload][2], held)


def check_memory(offload: str, seen: dict[str, list[int]], held: dict[str, dict[str, int]]) -> None:
    """held: of each model, the bytes of its parts where all are on the device."""
    trained = {role for role, parts in held.items() if "optimizer" in parts}
    scored = {f"score {role}" for role in held}
    assert seen.keys() == {"rollout", *scored, *(f"{act} {r}" for act in ("update", "step") for r in trained)}
    whole = sum(sum(parts.values()) for parts in held.values())
    for phase, found in seen.items():
        # How a model is made has no part in what planning says of offload.
        sized = {r: mock.Mock(spec=m.SizedModel, role=r, trained=r in trained, stays=False) for r in held}
        away = sum(m.waiting(sized[r], m.Resident(**parts), offload, phase).total for r, parts in held.items())
        assert max(found) == whole - away, phase  # less before the first step, which makes Adam's state
        assert offload != "all" or min(found) == max(found), phase
    if offload == "all":
        weights = sum(held[role]["weights"] for role in trained)
        assert set(seen["rollout"]) == {weights}, "only what sampling and scoring read of the trained models"
