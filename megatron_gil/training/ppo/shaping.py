"""The order of shaping: from a rollout and its scores to an Experience, every coupling settled as a constant.

score -> normalise and clip -> p(g_high) -> token rewards with the adaptive KL -> group statistics, omega and c ->
GAE (-> whitening). This order breaks the circle rewards -> returns -> groups -> KL -> rewards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_gil.algo.advantages import gae, grpo_advantages, rloo_advantages, shape_rewards
from megatron_gil.algo.masked import ScoreMoments, whiten
from megatron_gil.config import GilSection, PpoSection
from megatron_gil.training.ppo.grouping import Grouping
from megatron_gil.training.ppo.shaping_metrics import (
    add_group_means,
    add_shaping_means,
    group_metrics,
    rollout_means,
    token_kl,
    with_deviations,
)
from megatron_gil.types import AllSum, Experience, Rollout, Scores


@torch.no_grad()
def shape_experience(
    rollout: Rollout,
    scores: Scores,
    *,
    moments: ScoreMoments,
    grouping: Grouping,
    num_updates: int,
    ppo: PpoSection,
    gil: GilSection,
    known_names: tuple[str, ...],
    repeated: Tensor,
    all_sum: AllSum,
) -> tuple[Experience, ScoreMoments, dict[str, float]]:
    """(experience, moments with this rollout's scores, metrics over all ranks).

    num_updates: the critic's updates before this iteration (warm-up and ramp of the groups). known_names: of the labels
    that came with the data, and repeated [B]: whether a response is the same to another prompt; for metrics alone.
    """
    mask = rollout.response_mask
    normalized = scores.scores
    if ppo.normalize_score:
        moments = moments.merge(scores.scores, all_sum=all_sum)
        normalized = moments.normalize(scores.scores, clip=ppo.score_clip)

    flipped = grouping.observe_scores(scores.group_probs, scores.scores)
    grouping.observe_kl(scores.group_probs, token_kl(rollout, scores).sum(1), num_updates)
    kl_weights = grouping.kl_weights(scores.group_probs, num_updates)
    rewards = shape_rewards(
        normalized, scores.log_probs, scores.ref_log_probs, mask, kl_coef=ppo.kl_coef, kl_weights=kl_weights
    )
    trajectory_returns = normalized if gil.group_return == "score" else rewards.sum(1)
    ordering = trajectory_returns
    if gil.group_value == "weighted_log_prob":  # the printed formula; wrong sign, see algo/groups.py
        rewards_to_go, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma=1.0, gae_lambda=1.0)
        ordering = (scores.log_probs * mask * rewards_to_go).sum(1)
    invariance = grouping.settle(scores.group_probs, ordering, num_updates)

    advantages, returns = _advantages(rewards, scores.values, mask, ppo)
    if ppo.whiten_advantages and ppo.advantages != "grpo":
        advantages = whiten(advantages, mask, all_sum=all_sum)
    experience = Experience(
        tokens=rollout.tokens,
        lengths=rollout.lengths,
        response_mask=mask,
        log_probs=scores.log_probs,
        values=scores.values,
        advantages=advantages,
        returns=returns,
        invariance_weights=invariance.weights,
        classifier_coefs=invariance.coefs,
        row_ids=rollout.row_ids,
    )
    means = rollout_means(rollout, scores.scores, known_names)
    means.add("response/duplicate_fraction", repeated)
    add_shaping_means(means, rollout, scores, trajectory_returns, kl_weights)
    if scores.group_probs.shape[1] > 1:
        add_group_means(means, rollout, scores, repeated, invariance)
    metrics = with_deviations(means.reduce(all_sum))
    if grouping.num_groups > 1:
        metrics |= group_metrics(grouping, invariance, flipped, metrics.pop("group/row_entropy"))
    return experience, moments, metrics


def _advantages(rewards: Tensor, values: Tensor, mask: Tensor, ppo: PpoSection) -> tuple[Tensor, Tensor]:
    """(advantages, value targets), both [B, S]; without a critic one advantage per response, and targets of 0."""
    if ppo.advantages == "gae":
        return gae(rewards, values, mask, gamma=ppo.gamma, gae_lambda=ppo.gae_lambda)
    compare = {"rloo": rloo_advantages, "grpo": grpo_advantages}[ppo.advantages]
    by_row = compare(rewards.sum(1), responses_per_prompt=ppo.responses_per_prompt)
    return torch.where(mask, by_row[:, None], 0), torch.zeros_like(rewards)
