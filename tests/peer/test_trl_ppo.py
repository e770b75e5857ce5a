"""PPO against TRL's `PPOTrainer.train`: it samples, shapes and takes two updates; `PpoTrainer` does so on its rollout.

The policy's and the critic's gradients of both updates are compared: the first has rho = 1, the second is after a step
of gradient descent on each side, long enough that both clips bind. Where the two differ by convention:

- TRL minimises policy + vf_coef * value in one optimizer, this project each in its own: vf_coef = 1. Both have the 1/2
  in the value loss, clip the value around the old one, and average over the tokens of the whole batch; TRL over those
  of each microbatch, so it gets one.
- Both put the KL (k1, per token) into the reward. TRL has no running normalisation of scores: normalize_score off.
- TRL always whitens the advantages, by the unbiased variance (n - 1); this project by that of the population (n): its
  advantages are multiplied by sqrt((n - 1) / n). The surrogate is linear in them, so nothing else changes.
- TRL divides logits by temperature + 1e-7: it gets ours less 1e-7.
- TRL's n / (n - 1) and megatron-core's 1 / tokens are float32 numbers: that is the difference that is left.
- Where a response ends before the length limit, TRL gives the score one token after the end, learns a value there,
  and lets the advantages flow from it. With gamma = lambda = 1 its value cancels out of every advantage, and the critic
  only has one more state per ended response, which is handed to this project's critic as well. For other gamma and
  lambda TRL bootstraps from that state and this project from nothing: `test_shaping_of_ended_responses` has the rest.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_gil.algo.advantages import gae, shape_rewards
from megatron_gil.algo.masked import whiten
from tests.peer import our_side
from tests.peer.difference import relative, worst_gradient
from tests.ranks import run_ranks

pytest.importorskip("trl", reason="TRL is not installed: pip install '.[peer]'")

NUM_ROWS, LR, KL_COEF, CLIP, VALUE_CLIP = 8, 1.0, 0.125, 0.05, 0.1
SEED = 6  # samples the end in half of the responses and padding in none, see _check_sample
TOLERANCE = 1e-6
METRICS = {
    "loss/policy_avg": "policy/loss",
    "loss/value_avg": "critic/value_loss",
    "policy/clipfrac_avg": "policy/clip_fraction",
    "val/clipfrac_avg": "critic/clip_fraction",
    "objective/scores": "reward/score_mean",
    "objective/kl": "policy/kl_sequence",
    "objective/rlhf_reward": "reward/return_mean",
}


def _theirs(
    world: Path, out: Path, *, gamma: float, gae_lambda: float, temperature: float = 1.0, **settings: Any
) -> Any:
    from tests.peer import trl_side

    run = trl_side.ppo(
        world,
        out,
        NUM_ROWS,
        seed=SEED,
        lr=LR,
        response_length=10,
        temperature=temperature - 1e-7,
        kl_coef=KL_COEF,
        vf_coef=1.0,
        cliprange=CLIP,
        cliprange_value=VALUE_CLIP,
        gamma=gamma,
        lam=gae_lambda,
        **settings,
    )
    _check_sample(run, ends=settings["stop_token"] is not None)
    return run


def _check_sample(run: Any, *, ends: bool) -> None:
    """Prompts of several lengths; responses of several, if ends, else all as long as they may be."""
    prompts, responses = run.tokens[:, : run.num_prompt_columns], run.tokens[:, run.num_prompt_columns :]
    lengths = (responses != our_side.PAD_ID).sum(1)
    assert len((prompts != our_side.PAD_ID).sum(1).unique()) > 3
    if ends:
        assert len(lengths.unique()) > 3
        after_end = torch.arange(responses.shape[1]) >= lengths[:, None]
        assert torch.equal(responses == our_side.PAD_ID, after_end), "padding was sampled: choose another seed"
    else:
        assert set(lengths.tolist()) == {responses.shape[1]}, "padding was sampled: choose another seed"


def _ours(world: Path, theirs: Any, *, ends: bool, **settings: Any) -> our_side.PpoRun:
    work = partial(our_side.ppo, lr=LR, state_after_end=ends, kl_coef=KL_COEF, **settings)
    return run_ranks(work, 1, world, theirs.tokens, theirs.num_prompt_columns)[0]


@pytest.mark.parametrize(
    ("stop_token", "gamma", "gae_lambda", "temperature"),
    [(None, 0.9, 0.8, 1.0), ("eos", 1.0, 1.0, 1.0), (None, 0.9, 0.8, 0.7)],
    ids=["whole responses", "ended responses", "temperature 0.7"],
)
def test_two_updates(
    world: Path, out: Path, stop_token: str | None, gamma: float, gae_lambda: float, temperature: float
) -> None:
    discount = {"gamma": gamma, "gae_lambda": gae_lambda, "temperature": temperature}
    theirs = _theirs(world, out, stop_token=stop_token, num_ppo_epochs=2, **discount)
    clips = {"clip_range": CLIP, "value_clip_range": VALUE_CLIP}
    ours = _ours(world, theirs, ends=stop_token is not None, epochs=2, **clips, **discount)
    losses, gradients = [], []
    for policy, critic, their_loss, their_gradients in zip(
        ours.policy, ours.critic, theirs.losses, theirs.gradients, strict=True
    ):
        losses.append(relative(policy.loss + critic.loss, their_loss))
        gradients.append(
            {
                "policy": worst_gradient(policy.gradients, their_gradients["policy"]),
                "critic": worst_gradient(critic.gradients, their_gradients["critic"]),
            }
        )
    print(f"stop {stop_token}: losses {theirs.losses}, differences {losses}; worst gradients {gradients}")
    assert len(losses) == 2
    assert max(losses) <= TOLERANCE
    assert max(worst for update in gradients for worst in update.values()) <= TOLERANCE
    for their_name, name in METRICS.items():
        assert ours.metrics[name] == pytest.approx(theirs.metrics[their_name], abs=1e-6), name  # float32 on TRL's side
    assert 0.1 < ours.policy[1].metrics["policy/clip_fraction"] < 0.9
    assert 0.05 < ours.critic[1].metrics["critic/clip_fraction"] < 0.9


def test_shaping_of_ended_responses(world: Path, out: Path) -> None:
    """KL rewards, whitening, and GAE, each on what TRL put into its own.

    TRL's `whiten_rewards`, which this project does not have, is on because it shows the rewards.
    """
    discount = {"gamma": 0.9, "gae_lambda": 0.8}
    theirs = _theirs(world, out, stop_token="eos", num_ppo_epochs=1, whiten_rewards=True, **discount)
    ours = _ours(world, theirs, ends=False, **discount)
    scores, mask = ours.scores, ours.experience.response_mask
    rewards, advantages = theirs.whitened
    with_after = rewards.mask  # one column after the end, where TRL has the score
    assert torch.equal(advantages.mask, mask)
    assert 0 < int((with_after & ~mask).sum()) < len(mask)

    own_rewards = shape_rewards(
        scores.scores,
        scores.log_probs,
        scores.ref_log_probs,
        mask,
        kl_coef=KL_COEF,
        kl_weights=torch.ones(len(mask), dtype=torch.float64),
    )
    late = torch.where(with_after & ~mask, rewards.x, 0)
    moved = rewards.x - late + torch.nn.functional.pad(late[:, 1:], (0, 1))
    _close(own_rewards, moved, mask, "rewards")

    own_advantages, _ = gae(torch.where(with_after, rewards.result, 0), scores.values, with_after, **discount)
    _close(own_advantages, advantages.x, with_after, "GAE")
    _close_whitening(advantages)


def _close_whitening(call: Any) -> None:
    """Up to Bessel's correction, of what is not the mean."""
    x, mask = call.x, call.mask
    assert call.shift_mean
    own = whiten(x, mask, all_sum=lambda t: t.clone())
    count = int(mask.sum())
    _close(own * ((count - 1) / count) ** 0.5, call.result, mask, "whitening")


def _close(found: Tensor, expected: Tensor, mask: Tensor, what: str) -> None:
    difference = float((found - expected)[mask].abs().max() / expected[mask].abs().max())
    print(f"{what}: difference {difference:.1e}")
    assert difference <= TOLERANCE, what
