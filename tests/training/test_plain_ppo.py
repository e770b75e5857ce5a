"""gil.num_groups=1 is plain PPO to the last bit; p(g_high) = 1 and 0 are PPO with and without KL.

The plain PPO here is a loop of its own that knows nothing of groups, over the same engine.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_gil.algo.advantages import gae, shape_rewards
from megatron_gil.algo.masked import ScoreMoments, whiten
from megatron_gil.algo.ppo import policy_loss, value_loss
from megatron_gil.config import PpoConfig
from megatron_gil.engine.generation import Generator
from megatron_gil.engine.megatron import TrainableModel
from megatron_gil.engine.protocol import Part
from megatron_gil.parallel.collectives import all_sum
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.training.ppo.grouping import Grouping, KnownGroups, SingleGroup
from megatron_gil.types import Experience, take_rows
from tests.ranks import run_ranks
from tests.training.running import (
    DP2,
    ONE,
    TP2,
    build,
    full_weights,
    layout_name,
    make_trainer,
    merge,
    parallel,
    ppo_config,
    read_prompts,
    trained_models,
    world_size,
)

NUM_ITERATIONS, LR = 3, 1e-2
SIZES = {"batch": {"global_size": 8}, "ppo": {"iterations": NUM_ITERATIONS, "epochs": 2, "kl_coef": 0.1}}
Weights = dict[str, dict[str, Tensor]]


def _with_one_group(root: Path, layout: ParallelLayout) -> Weights:
    trainer = make_trainer(ppo_config(gil={"num_groups": 1}, **SIZES), root, layout)
    for iteration in range(NUM_ITERATIONS):
        trainer.iterate(iteration)
    return {role: full_weights(model) for role, model in trained_models(trainer).items()}


def _plain(root: Path, layout: ParallelLayout) -> Weights:
    config = ppo_config(**SIZES)
    tokenizer, prompts = read_prompts(config, root, layout)
    policy: TrainableModel = build(root / "policy", layout, "lm", kind=TrainableModel, optimizer=config.optimizer)
    critic: TrainableModel = build(
        root / "reward_model", layout, "critic", kind=TrainableModel, optimizer=config.critic_optimizer
    )
    reference, reward_model = build(root / "policy", layout, "lm"), build(root / "reward_model", layout, "score")
    generator = Generator(policy, config.sampling, tokenizer=tokenizer, seed=config.run.seed)
    moments, sums = ScoreMoments(), all_sum(layout)
    for iteration in range(NUM_ITERATIONS):
        rollout = generator.sample(prompts.batch(iteration))
        mask = rollout.response_mask
        old_log_probs, old_values = policy.evaluate(rollout).log_probs, critic.evaluate(rollout).values
        scores = reward_model.evaluate(rollout).scores
        moments = moments.merge(scores, all_sum=sums)
        rewards = shape_rewards(
            moments.normalize(scores, clip=config.ppo.score_clip),
            old_log_probs,
            reference.evaluate(rollout).log_probs,
            mask,
            kl_coef=config.ppo.kl_coef,
            kl_weights=torch.ones(len(mask)),
        )
        advantages, returns = gae(rewards, old_values, mask, gamma=1.0, gae_lambda=config.ppo.gae_lambda)
        rows = _experience(rollout, old_log_probs, old_values, whiten(advantages, mask, all_sum=sums), returns)
        _optimize(policy, critic, rows, config, 8 // layout.dp_size)
    return {"policy": full_weights(policy), "critic": full_weights(critic)}


def _experience(rollout: Any, log_probs: Tensor, values: Tensor, advantages: Tensor, returns: Tensor) -> Experience:
    """The group's fields hold what would spoil everything if it were read."""
    nothing = torch.full((len(values), 1), torch.nan)
    return Experience(
        tokens=rollout.tokens,
        lengths=rollout.lengths,
        response_mask=rollout.response_mask,
        log_probs=log_probs,
        values=values,
        advantages=advantages,
        returns=returns,
        invariance_weights=nothing[:, 0],
        classifier_coefs=nothing,
        row_ids=rollout.row_ids,
    )


def _optimize(policy: TrainableModel, critic: TrainableModel, rows: Experience, config: PpoConfig, size: int) -> None:
    ppo = config.ppo

    def value(readout: Any, part: Experience) -> Any:
        return value_loss(
            readout.values, part.values, part.returns, part.response_mask, value_clip_range=ppo.value_clip_range
        )

    def surrogate(readout: Any, part: Experience) -> Any:
        return policy_loss(
            readout.log_probs, part.log_probs, part.advantages, part.response_mask, clip_range=ppo.clip_range
        )

    for _ in range(ppo.epochs):
        for start in range(0, len(rows.tokens), size):
            minibatch = take_rows(rows, slice(start, start + size))
            critic.update(Part(batch=minibatch, loss_fn=value), lr=LR)
            policy.update(Part(batch=minibatch, loss_fn=surrogate), lr=LR)


def _both(layout: dict[str, Any], root: Path) -> tuple[Weights, Weights]:
    with parallel(layout) as started:
        return _with_one_group(root, started), _plain(root, started)


@pytest.mark.parametrize("layout", [ONE, TP2, DP2], ids=layout_name)
def test_one_group_is_plain_ppo(layout: dict[str, Any], world: Path) -> None:
    ranks = run_ranks(_both, world_size(layout), layout, world)
    for role in ("policy", "critic"):
        grouped, plain = (merge([rank[which][role] for rank in ranks]) for which in (0, 1))
        start = _start(world, role)
        assert grouped.keys() == plain.keys()
        assert all(torch.equal(grouped[name], plain[name]) for name in plain)
        assert any(not torch.equal(plain[name], start[name]) for name in start if name in plain), "nothing moved"


def _start(world: Path, role: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(world / {"policy": "policy", "critic": "reward_model"}[role] / "model.safetensors")


class _AllInOne(KnownGroups):
    """Two groups, and every row in the first."""

    def probs(self, rollout: Any, classifier: Any) -> Tensor:
        return torch.tensor([[1.0, 0.0]]).repeat(len(rollout.tokens), 1)


def _two_iterations(root: Path, layout: ParallelLayout, grouping: Grouping, kl_coef: float) -> dict[str, Tensor]:
    """The second one's KL is not 0."""
    config = ppo_config(ppo={"kl_coef": kl_coef, "normalize_score": False})
    trainer = make_trainer(config, root, layout, grouping=grouping)
    for iteration in range(2):
        trainer.iterate(iteration)
    return full_weights(trained_models(trainer)["policy"])


def _high_or_not(root: Path) -> dict[str, dict[str, Tensor]]:
    with parallel(ONE) as layout:
        sums = all_sum(layout)
        gil = ppo_config().gil
        high, low, floored = (_AllInOne(section, 2, sums) for section in (gil, gil, replace(gil, kl_floor=1.0)))
        for grouping in (low, floored):
            grouping.load_state({"ema": [None, 1e6], "index": 1})  # the empty group stays the high one
        found = {
            "p 1": _two_iterations(root, layout, high, 0.5),
            "p 0": _two_iterations(root, layout, low, 0.5),
            "p 0, floor 1": _two_iterations(root, layout, floored, 0.5),
            "with": _two_iterations(root, layout, SingleGroup(sums), 0.5),
            "without": _two_iterations(root, layout, SingleGroup(sums), 0.0),
        }
        assert (high.high, low.high) == (0, 1)
        return found


def test_the_high_group_pays_the_whole_penalty_and_the_others_none(world: Path) -> None:
    found = run_ranks(_high_or_not, 1, world)[0]
    for ours, plain in (("p 1", "with"), ("p 0", "without"), ("p 0, floor 1", "with")):
        assert all(torch.equal(found[ours][name], found[plain][name]) for name in found[plain]), ours
    assert any(not torch.equal(found["with"][name], found["without"][name]) for name in found["with"])
