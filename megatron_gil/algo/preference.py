"""Losses on pairs; index 0 of the second axis is the chosen response, 1 the rejected one."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_gil.types import LossSum


def pairwise_loss(scores: Float[Tensor, "batch 2"], *, center_coef: float = 0.0) -> LossSum:
    """- sum_i log sigmoid(score_chosen - score_rejected) (Bradley-Terry), a sum over pairs.

    Only differences of scores are learned; `center_coef` adds center_coef * (score_chosen + score_rejected)^2, which
    keeps their mean near 0 (arXiv 2312.09244, section 3), where a group classifier that starts from the score head
    splits them.

    Metrics: reward/loss (without that term), reward/margin (score_chosen - score_rejected), reward/mean_score,
    reward/accuracy (a tie counts one half, so that swapped labels give exactly 1 - accuracy and a constant model 0.5).
    """
    margin = scores[:, 0] - scores[:, 1]
    loss = -logsigmoid(margin).sum()
    total = loss if center_coef == 0 else loss + center_coef * scores.sum(1).square().sum()
    metrics = {
        "reward/loss": loss.detach(),
        "reward/margin": margin.detach().sum(),
        "reward/mean_score": scores.detach().mean(1).sum(),
        "reward/accuracy": _wins(margin),
    }
    return LossSum(total=total, metrics=metrics)


def dpo_loss(
    policy_log_probs: Float[Tensor, "batch 2"],
    ref_log_probs: Float[Tensor, "batch 2"],
    *,
    beta: float,
    label_smoothing: float,
) -> LossSum:
    """Direct preference optimisation (arXiv 2305.18290, eq. 7) on log-probs of whole responses, a sum over pairs.

        h_i = beta [(log pi - log pi_ref)_chosen - (log pi - log pi_ref)_rejected]
        total = - sum_i (1 - label_smoothing) log sigmoid(h_i) + label_smoothing log sigmoid(-h_i)

    Metrics: dpo/loss, dpo/margin (h), dpo/accuracy (h > 0, a tie counts one half), dpo/chosen_reward and
    dpo/rejected_reward (beta (log pi - log pi_ref)).
    """
    rewards = beta * (policy_log_probs - ref_log_probs)
    margin = rewards[:, 0] - rewards[:, 1]
    total = -((1 - label_smoothing) * logsigmoid(margin) + label_smoothing * logsigmoid(-margin)).sum()
    chosen_reward, rejected_reward = rewards.detach().sum(dim=0)
    metrics = {
        "dpo/loss": total.detach(),
        "dpo/margin": margin.detach().sum(),
        "dpo/accuracy": _wins(margin),
        "dpo/chosen_reward": chosen_reward,
        "dpo/rejected_reward": rejected_reward,
    }
    return LossSum(total=total, metrics=metrics)


@torch.no_grad()
def _wins(margin: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    return ((margin > 0).to(margin.dtype) + (margin == 0).to(margin.dtype) / 2).sum()
