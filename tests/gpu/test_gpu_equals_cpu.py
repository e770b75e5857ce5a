"""A GPU computes what the CPU computes: logits, gradients, samples and PPO-GIL iterations of small random Llamas."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.gpu.compare import apart, flatten, norm_distance
from tests.gpu.processes import Sides
from tests.gpu.synchronisations import compare_counts

pytestmark = pytest.mark.gpu

FLOAT32 = 1e-4
"""Of the largest value of each tensor. Sums in another order differ by some 1e-6; weights of one part in 1e7 off move
nothing here by more than 3e-5."""
TIMES_THE_CPUS, ONE_ROUNDING = 2.0, 2**-8
"""bfloat16 on the GPU may be this many times as far from float32 on the CPU as bfloat16 on the CPU is (up to 4 % of a
tensor's norm here), and one rounding more: its kernels round at other places."""
PARTS = ("logits", "gradients", "iteration")


@pytest.mark.parametrize("part", [*PARTS, "updates"])
def test_float32_agrees(part: str, sides: Sides) -> None:
    ours, theirs = flatten(sides.of("cuda")[part]), flatten(sides.of("cpu")[part])
    assert apart(ours, theirs, FLOAT32) == []


@pytest.mark.parametrize("part", PARTS)
def test_bfloat16_is_as_near_to_float32_as_on_the_cpu(part: str, sides: Sides) -> None:
    exact = flatten(sides.of("cpu")[part])
    ours, theirs = (flatten(sides.of(device, "bfloat16")[part]) for device in ("cuda", "cpu"))
    assert ours.keys() == theirs.keys() == exact.keys()
    too_far = []
    for name, value in exact.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        far, allowed = norm_distance(ours[name], value), norm_distance(theirs[name], value)
        if not far <= TIMES_THE_CPUS * allowed + ONE_ROUNDING:
            too_far.append(f"{name}: {far:.1e} of the norm, {allowed:.1e} on the CPU")
    assert too_far == []


def test_sampled_tokens_are_the_cpus(sides: Sides) -> None:
    ours, theirs = sides.of("cuda")["samples"], sides.of("cpu")["samples"]
    assert ours.keys() == theirs.keys()
    for name, tokens in theirs.items():
        assert torch.equal(ours[name], tokens), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_kl_is_exactly_0_and_the_first_ratio_exactly_1(dtype: str, sides: Sides) -> None:
    found: dict[str, Any] = sides.of("cuda", dtype)["iteration"]
    scores, metrics = found["scores"], found["metrics"]
    assert torch.equal(scores["log_probs"], scores["ref_log_probs"])
    for name in ("policy/kl", "policy/kl_sequence", "policy/approx_kl", "policy/clip_fraction"):
        assert metrics[name] == 0.0, name
    assert metrics["policy/ratio"] == 1.0


def test_the_pretended_gpu_synchronises_where_the_real_one_does(sides: Sides) -> None:
    pytest.importorskip("tests.pretend", reason="this checkout has no tests/pretend")
    real, pretended = (sides.of(device)["synchronisations"] for device in ("cuda", "pretended"))
    assert sum(real.values()) > 0
    assert compare_counts(real, pretended) == []
