"""What metrics.jsonl says of a rollout, its scores and its groups."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_gil.training.ppo.grouping import Grouping, Invariance
from megatron_gil.training.run.metrics import Means
from megatron_gil.types import Rollout, Scores


def rollout_means(rollout: Rollout, scores: Tensor, known_names: tuple[str, ...]) -> Means:
    """What can be said of responses and their scores [B] alone, by known label too."""
    means = Means()
    means.add("reward/score_mean", scores)
    means.add("reward/score_squared", scores.double().square())
    means.add("response/tokens", rollout.response_mask.sum(1))
    means.add("response/finished_fraction", rollout.finished)
    for number, name in enumerate(known_names):
        means.add(f"reward/score_mean_known_{name}", scores, rollout.known_groups == number)
    return means


def token_kl(rollout: Rollout, scores: Scores) -> Tensor:
    """[B, S] log pi - log pi_ref of the response's tokens, nats; 0 elsewhere."""
    return torch.where(rollout.response_mask, scores.log_probs - scores.ref_log_probs, 0)


def add_shaping_means(means: Means, rollout: Rollout, scores: Scores, returns: Tensor, kl_weights: Tensor) -> None:
    mask = rollout.response_mask
    kl = token_kl(rollout, scores)
    means.add("reward/return_mean", returns)
    means.add("policy/kl", kl, mask)
    means.add("policy/kl_sequence", kl.sum(1))
    means.add("policy/kl_weight", kl_weights)
    means.add("policy/entropy", scores.entropy, mask)
    means.add("policy/sampling_mismatch", (rollout.sampled_log_probs - scores.log_probs).abs(), mask)


def add_group_means(means: Means, rollout: Rollout, scores: Scores, repeated: Tensor, invariance: Invariance) -> None:
    """Of each inferred group, every row weighted by its probability of being in it, and of omega."""
    means.add("group/negative_weights", (invariance.weights < 0).double())
    means.add("group/weight_squared", invariance.weights.double().square())
    means.add("group/row_entropy", torch.special.entr(scores.group_probs.double()).sum(1))
    mask = rollout.response_mask
    kl = token_kl(rollout, scores).sum(1)
    for group, weight in enumerate(scores.group_probs.double().unbind(1)):
        means.add(f"reward/score_mean_group_{group}", scores.scores, weight)
        means.add(f"policy/kl_group_{group}", kl, weight)
        means.add(f"policy/entropy_group_{group}", scores.entropy, mask * weight[:, None])
        means.add(f"response/tokens_group_{group}", mask.sum(1), weight)
        means.add(f"response/duplicate_fraction_group_{group}", repeated, weight)


def with_deviations(metrics: dict[str, float]) -> dict[str, float]:
    """Standard deviations in the place of mean squares."""
    variance = metrics.pop("reward/score_squared") - metrics["reward/score_mean"] ** 2
    metrics["reward/score_std"] = max(0.0, variance) ** 0.5
    if "group/weight_squared" in metrics:  # omega averages 1
        metrics["group/weight_std"] = max(0.0, metrics.pop("group/weight_squared") - 1.0) ** 0.5
    return metrics


def group_metrics(grouping: Grouping, invariance: Invariance, flipped: bool, row_entropy: float) -> dict[str, float]:
    """row_entropy: mean over rows of the entropy of their probabilities."""
    stats = invariance.stats
    mass = stats.mass / stats.num_rows
    metrics = {
        "group/return_variance": stats.variance,
        "group/high": float(grouping.high),
        "group/flipped": float(flipped),
        "group/information": (float(torch.special.entr(mass).sum()) - row_entropy) / math.log(grouping.num_groups),
    }
    metrics |= {f"group/kl_factor_{side}": f for side, f in zip(("high", "low"), grouping.kl_factors, strict=False)}
    for group, (share, earned) in enumerate(torch.stack([mass, stats.group_return], dim=1).tolist()):
        metrics[f"group/mass_{group}"] = share
        metrics[f"group/return_{group}"] = earned
    return metrics
