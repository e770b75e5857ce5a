"""What must hold to the last bit at every layout: the first iteration's zeros and ones, and what changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_gil.config import OptimizerSection, RewardSection
from megatron_gil.data.rows.preferences import PreferenceDataset
from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.demo.tiny_llama import PAD_ID
from megatron_gil.engine.megatron import TrainableModel
from megatron_gil.engine.protocol import Part
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.training.row_source import to_device
from megatron_gil.training.supervised.objectives import reward_loss_fn
from megatron_gil.types import PreferenceBatch, Rollout
from tests.gathered import gather_rows
from tests.ranks import run_ranks
from tests.training.running import (
    DP2,
    ONE,
    PP2,
    TP2,
    TP2_PP2,
    TP2_SP,
    build,
    full_weights,
    layout_name,
    make_trainer,
    parallel,
    ppo_config,
    trained_models,
    use_cache,
    world_size,
)

LAYOUTS = [ONE, TP2, TP2_SP, PP2, DP2, TP2_PP2]
WIDTH = 40  # of the gathered rollouts: ranks trim to their own longest row


def _first_iteration(root: Path, layout: ParallelLayout) -> dict[str, Any]:
    trainer = make_trainer(ppo_config(ppo={"kl_coef": 0.2}), root, layout)
    metrics = trainer.iterate(0)
    readout = trainer.models.ref_policy.evaluate(trainer.last_rollout)
    return {
        "metrics": dict(metrics),
        "difference": float((trainer.last_scores.log_probs - readout.log_probs).abs().max()),
        "rollout": _gather(trainer.last_rollout, layout),
    }


def _gather(rollout: Rollout, layout: ParallelLayout) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, lengths, finished) of all ranks in the order of the sample ids."""
    wide = torch.nn.functional.pad(rollout.tokens, (0, WIDTH - rollout.tokens.shape[1]), value=PAD_ID)
    order = gather_rows(rollout.sample_ids, layout).argsort()
    return (
        gather_rows(wide, layout)[order],
        gather_rows(rollout.lengths, layout)[order],
        gather_rows(rollout.finished, layout)[order],
    )


def _rate_zero(root: Path, layout: ParallelLayout) -> tuple[bool, dict[str, float]]:
    """(whether an iteration at rate 0 moves no weight, its metrics); weight decay is on, heads are tied."""
    still = {"lr": 0.0, "weight_decay": 0.1}
    config = ppo_config(optimizer=still, critic_optimizer=still, gil={"classifier": "own_model"})
    trainer = make_trainer(config, root, layout, policy="tied")
    before = {role: full_weights(model) for role, model in trained_models(trainer).items()}
    metrics = dict(trainer.iterate(0))
    after = {role: full_weights(model) for role, model in trained_models(trainer).items()}
    return all(torch.equal(before[role][name], after[role][name]) for role in before for name in before[role]), metrics


def _accuracies(root: Path, layout: ParallelLayout) -> tuple[float, float]:
    """Reward accuracy of one update's batch, as labelled and with the labels swapped; from equal weights."""
    use_cache(root)
    tokenizer = Tokenizer.read(root / "policy")
    pairs = PreferenceDataset(root / "preferences.jsonl", tokenizer, max_tokens=48, max_prompt_tokens=32)
    share = 24 // layout.dp_size
    batch = to_device(pairs.collate(range(layout.dp_rank * share, (layout.dp_rank + 1) * share)), layout)
    found = []
    for labelled in (batch, _swap(batch)):
        model: TrainableModel = build(
            root / "reward_model", layout, "score", kind=TrainableModel, optimizer=OptimizerSection()
        )
        metrics = model.update(Part(batch=labelled, loss_fn=reward_loss_fn(RewardSection()), per="row"), lr=0.0).metrics
        found.append(metrics["reward/accuracy"])
    return found[0], found[1]


def _swap(batch: PreferenceBatch) -> PreferenceBatch:
    flipped = {name: getattr(batch, name).flip(1) for name in ("tokens", "lengths", "response_mask")}
    return replace(batch, **flipped)


def _facts(layout: dict[str, Any], root: Path) -> dict[str, Any]:
    with parallel(layout) as started:
        return {
            "first": _first_iteration(root, started),
            "still": _rate_zero(root, started),
            "accuracies": _accuracies(root, started),
        }


@pytest.fixture(scope="module")
def one_rank(world: Path) -> dict[str, Any]:
    return run_ranks(_facts, 1, ONE, world)[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
def test_facts(layout: dict[str, Any], world: Path, one_rank: dict[str, Any]) -> None:
    ranks = [one_rank] if layout == ONE else run_ranks(_facts, world_size(layout), layout, world)
    for rank in ranks:
        metrics = rank["first"]["metrics"]
        assert rank["first"]["difference"] == 0.0, "policy and reference differ before any update"
        assert metrics["policy/kl"] == metrics["policy/kl_sequence"] == 0.0
        assert metrics["policy/ratio"] == 1.0, "evaluate and update do not see the same log-probs"
        assert metrics["policy/approx_kl"] == metrics["policy/clip_fraction"] == 0.0
        still, tied_metrics = rank["still"]
        assert still, "a rate of 0 moved a weight"
        accuracy, swapped = rank["accuracies"]
        assert swapped == 1 - accuracy
        assert accuracy not in (0.0, 0.5, 1.0), "swapping would prove nothing"
        own = {name: value for name, value in metrics.items() if not name.startswith("time/")}
        assert own == {n: v for n, v in ranks[0]["first"]["metrics"].items() if n in own}, "ranks log other numbers"
        _compare(metrics, one_rank["first"]["metrics"])
        _compare(tied_metrics, one_rank["still"][1])
        for found, expected in zip(rank["first"]["rollout"], one_rank["first"]["rollout"], strict=True):
            assert torch.equal(found, expected), "samples depend on the layout"


def _compare(found: dict[str, float], expected: dict[str, float]) -> None:
    """Every number of the iteration, gradient norms of sharded and tied weights among them, up to float32 rounding."""
    assert found.keys() == expected.keys()
    assert expected["policy/gradient_norm"] > 0
    for name, value in expected.items():
        if not name.startswith(("time/", "batch/")):  # what is computed beside it depends on the layout
            assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_the_samples_have_both_ends(one_rank: dict[str, Any]) -> None:
    finished = one_rank["first"]["rollout"][2]
    assert 0 < int(finished.sum()) < len(finished)
