"""Every gradient of every method, by tensor, for any cut: tensor, sequence, pipeline and data parallel, microbatches.

The losses are those the commands train with; PPO's come from a real PpoTrainer, from sampling to the backward pass.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_gil.config import DpoSection, RewardSection
from megatron_gil.data.rows.demonstrations import DemonstrationDataset
from megatron_gil.data.rows.preferences import PreferenceDataset
from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.engine.protocol import Part
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.training.row_source import to_device
from megatron_gil.training.supervised.objectives import dpo_loss_fn, fill_ref_log_probs, reward_loss_fn, sft_loss
from megatron_gil.types import Experience
from tests.gathered import gather_rows
from tests.ranks import run_ranks
from tests.training.running import (
    DP2,
    ONE,
    PP2,
    TP2,
    TP2_PP2,
    TP2_SP,
    GradientModel,
    build,
    layout_name,
    make_trainer,
    merge,
    parallel,
    ppo_config,
    trained_models,
    use_cache,
    world_size,
)

Gradients = dict[str, dict[str, Tensor]]  # model of a method -> tensor by name
Microbatches = tuple[int, int | None]  # batch.micro_size, batch.micro_tokens
Found = dict[Any, tuple[Gradients, Any]]  # (dtype, microbatches) -> gradients, what the experience settled
NUM_ROWS = 16
MICROBATCHES: tuple[Microbatches, ...] = ((4, None), (1, None), (4, 100))
# Of ||a - b|| / ||b||: sums in another order. 1.2e-6 is the most that was seen of a tensor in float32.
TOLERANCE = {torch.float32: 1.5e-6, torch.float64: 1e-11}
UNUSED = ("own_model classifier", "score.weight")  # the value head of a critic-shaped model that only classifies
PPO = {
    "ppo": {"num_groups": 1},
    "gil": {},
    "own_model": {"classifier": "own_model"},
}


def _supervised(root: Path, layout: ParallelLayout, cut: Microbatches, dtype: torch.dtype) -> Gradients:
    tokenizer = Tokenizer.read(root / "policy")
    limits: dict[str, Any] = {"max_tokens": 48, "max_prompt_tokens": 32}
    share = NUM_ROWS // layout.dp_size
    mine = range(layout.dp_rank * share, (layout.dp_rank + 1) * share)
    texts = to_device(DemonstrationDataset(root / "demonstrations.jsonl", tokenizer, **limits).collate(mine), layout)
    pairs = to_device(PreferenceDataset(root / "preferences.jsonl", tokenizer, **limits).collate(mine), layout)
    common: dict[str, Any] = {"micro_size": cut[0], "micro_tokens": cut[1], "dtype": dtype}
    scored = fill_ref_log_probs(pairs, build(root / "other", layout, "lm", **common))
    work = {
        "sft": ("policy", "lm", texts, sft_loss),
        "sft tied": ("tied", "lm", texts, sft_loss),
        "reward": ("reward_model", "score", pairs, reward_loss_fn(RewardSection(center_coef=0.01))),
        "dpo": ("policy", "lm", scored, dpo_loss_fn(DpoSection(beta=0.3, label_smoothing=0.1))),
    }
    work["sft tied, one microbatch"] = work["sft tied"]
    found = {}
    for name, (directory, head, batch, loss_fn) in work.items():
        model = build(root / directory, layout, head, kind=GradientModel, **common)
        if name.endswith("one microbatch"):
            model.micro_size, model.micro_tokens = share, None
        per = "token" if name.startswith("sft") else "row"
        model.update(Part(batch=batch, loss_fn=loss_fn, per=per), lr=0.0)
        found[name] = model.gradients[0]
    return found


def _ppo(root: Path, layout: ParallelLayout, cut: Microbatches, dtype: torch.dtype) -> tuple[Gradients, Any]:
    """(gradients, omega and c and the rest of the experience of all ranks, by method)."""
    gradients, settled = {}, {}
    for name, gil in PPO.items():
        config = ppo_config(
            gil=gil,
            batch={"micro_size": cut[0], "micro_tokens": cut[1]},
            ppo={"clip_range": 0.05, "value_clip_range": 0.1},
        )
        trainer = make_trainer(config, root, layout, kind=GradientModel, dtype=dtype)
        rollout = trainer.sample(trainer.prompts.batch(0))
        experience, _ = trainer.shape(rollout, trainer.score(rollout))
        metrics = trainer.optimize(_as_if_older(experience, rollout.sample_ids))
        gradients |= {
            f"{name} {role}": model.gradients[0]
            for role, model in trained_models(trainer).items()
            if isinstance(model, GradientModel)
        }
        settled[name] = {
            "omega": gather_rows(experience.invariance_weights, layout),
            "c": gather_rows(experience.classifier_coefs, layout),
            "moments": torch.tensor([trainer.moments.mean, trainer.moments.m2], dtype=torch.float64),
            "clipped": torch.tensor([metrics["policy/clip_fraction"], metrics["critic/clip_fraction"]]),
        }
    return gradients, settled


def _as_if_older(experience: Experience, sample_ids: Tensor) -> Experience:
    """With log-probs and values of a policy and a critic some updates ago, so that both clips bind for some tokens."""
    generator = torch.Generator().manual_seed(9)
    noise = 0.1 * torch.randn(2, NUM_ROWS, 64, generator=generator, dtype=torch.float64)
    noise = noise[:, sample_ids, : experience.values.shape[1]].to(experience.values)
    return replace(experience, log_probs=experience.log_probs + noise[0], values=experience.values + 2 * noise[1])


def _all(layout: dict[str, Any], root: Path, cuts: tuple[Microbatches, ...]) -> Found:
    found = {}
    with parallel(layout) as started:
        use_cache(root)
        for dtype in TOLERANCE:
            for cut in cuts:
                gradients, settled = _ppo(root, started, cut, dtype)
                gradients |= _supervised(root, started, cut, dtype)
                found[dtype, cut] = gradients, settled
    return found


def _run(layout: dict[str, Any], root: Path, cuts: tuple[Microbatches, ...]) -> Found:
    ranks = run_ranks(_all, world_size(layout), layout, root, cuts)
    merged = {}
    for key, (gradients, settled) in ranks[0].items():
        merged[key] = {name: merge([rank[key][0][name] for rank in ranks]) for name in gradients}, settled
    return merged


@pytest.fixture(scope="module")
def one_rank(world: Path) -> Found:
    return _run(ONE, world, MICROBATCHES)


@pytest.fixture(scope="module")
def tensor_parallel(world: Path) -> Found:
    return _run(TP2, world, MICROBATCHES[:1])


def _worst(found: Gradients, expected: Gradients) -> dict[str, float]:
    """||a - b|| / ||b|| of the worst tensor of each model; every tensor must be there and not be zero."""
    assert found.keys() == expected.keys()
    worst = {}
    for model, tensors in expected.items():
        assert found[model].keys() == tensors.keys(), model
        for name, tensor in tensors.items():
            norm = tensor.double().norm()
            if (model, name) == UNUSED:
                assert norm == found[model][name].double().norm() == 0
                continue
            assert norm > 0, f"{model}: the gradient of {name} is zero"
            error = float((found[model][name].double() - tensor.double()).norm() / norm)
            worst[model] = max(worst.get(model, 0.0), error)
    return worst


def _check(
    found: Found,
    expected: Found,
    dtype: torch.dtype,
    cut: Microbatches = MICROBATCHES[0],
    expected_cut: Microbatches = MICROBATCHES[0],
) -> None:
    (gradients, settled), (expected_gradients, expected_settled) = found[dtype, cut], expected[dtype, expected_cut]
    worst = _worst(gradients, expected_gradients)
    print(f"{dtype}, microbatches of {cut}:", {name: f"{error:.1e}" for name, error in worst.items()})
    assert max(worst.values()) <= TOLERANCE[dtype], worst
    for method, numbers in expected_settled.items():
        for name, number in numbers.items():
            error = float((settled[method][name] - number).norm() / number.norm().clamp(min=1e-30))
            assert error <= TOLERANCE[dtype], (method, name, error)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_any_cut_into_microbatches(one_rank: Found, dtype: torch.dtype) -> None:
    for cut in MICROBATCHES[1:]:
        _check(one_rank, one_rank, dtype, cut)


def test_tensor_parallel(tensor_parallel: Found, one_rank: Found) -> None:
    for dtype in TOLERANCE:
        _check(tensor_parallel, one_rank, dtype)


@pytest.mark.parametrize("layout", [TP2_SP, DP2], ids=layout_name)
def test_sequence_and_data_parallel(layout: dict[str, Any], world: Path, one_rank: Found) -> None:
    cuts = MICROBATCHES[::2]  # by tokens, data-parallel ranks have more and fewer microbatches
    found = _run(layout, world, cuts)
    for dtype in TOLERANCE:
        for cut in cuts:
            _check(found, one_rank, dtype, cut, cut)


@pytest.mark.parametrize("layout", [PP2, TP2_PP2], ids=layout_name)
def test_pipeline_cuts_are_bitwise(
    layout: dict[str, Any], world: Path, one_rank: Found, tensor_parallel: Found
) -> None:
    """A tied embedding's two contributions lie on two stages: over several microbatches each stage sums its own first,
    which is another order than one rank's. With one microbatch they are two numbers, and equal bits again."""
    (cut, *_) = MICROBATCHES
    found, uncut = _run(layout, world, (cut,)), tensor_parallel if layout == TP2_PP2 else one_rank
    for dtype in TOLERANCE:
        worst = _worst(found[dtype, cut][0], uncut[dtype, cut][0])
        assert 0 < worst.pop("sft tied") <= TOLERANCE[dtype]
        assert set(worst.values()) == {0.0}, worst
        for method, numbers in uncut[dtype, cut][1].items():
            for name, number in numbers.items():
                assert torch.equal(found[dtype, cut][1][method][name], number), (method, name)


def test_both_clips_bind_and_the_groups_weigh(one_rank: Found) -> None:
    """The comparisons above would say little of a loss whose clips never bind or whose omega is 1."""
    settled = one_rank[torch.float64, MICROBATCHES[0]][1]["gil"]
    assert settled["omega"].std() > 0.05
    assert settled["c"].abs().max() > 0
    assert abs(float(settled["omega"].mean()) - 1) < 1e-12
    assert 0.05 < settled["clipped"][0] < 0.95
    assert 0.05 < settled["clipped"][1] < 0.95
