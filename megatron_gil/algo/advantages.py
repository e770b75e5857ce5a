"""From scores to rewards to advantages. Nothing here carries a gradient."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_gil.algo import kl

_STD_FLOOR = 1e-6
"""Added to a prompt's standard deviation of scores: equal scores give advantage 0."""


@torch.no_grad()
def shape_rewards(
    scores: Float[Tensor, " batch"],
    log_probs: Float[Tensor, "batch pos"],
    ref_log_probs: Float[Tensor, "batch pos"],
    response_mask: Bool[Tensor, "batch pos"],
    *,
    kl_coef: float,
    kl_weights: Float[Tensor, " batch"],
) -> Float[Tensor, "batch pos"]:
    """r_it = score_i [t is the last response token] - kl_coef * kl_weights_i * (log pi - log pi_ref)_it, all of it
    divided by max(1, kl_weights_i).

    0 outside the response. `kl_weights` is p(g_high | trajectory) of the adaptive KL: ones give PPO with KL, zeros PPO
    without. Weights above 1, which only controllers give, thus lower the score in the place of raising the penalty: the
    best policy of such rows is the same, and their penalty does not drown the scores of all other rows. A row without a
    response earns nothing.
    """
    scores = scores / kl_weights.clamp(min=1)
    penalty = (kl_coef * kl_weights.clamp(max=1))[:, None] * kl.k1(log_probs, ref_log_probs)
    tokens_so_far = response_mask.cumsum(dim=1)
    is_last = response_mask & (tokens_so_far == tokens_so_far[:, -1:])
    return torch.where(response_mask, torch.where(is_last, scores[:, None], 0) - penalty, 0)


@torch.no_grad()
def gae(
    rewards: Float[Tensor, "batch pos"],
    values: Float[Tensor, "batch pos"],
    response_mask: Bool[Tensor, "batch pos"],
    *,
    gamma: float,
    gae_lambda: float,
) -> tuple[Float[Tensor, "batch pos"], Float[Tensor, "batch pos"]]:
    """(advantages, returns) of generalised advantage estimation (arXiv 1506.02438, eq. 16), 0 outside the response.

        delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lambda A_{t+1},   return_t = A_t + V_t

    V and A are 0 after a row's last response token, whether it ended by itself or by the length limit. The response
    tokens of a row must be contiguous. The recursion is summed by doubling: log2 of the width steps, on all columns at
    once, in the place of one step a column.
    """
    values = torch.where(response_mask, values, 0)
    next_values = torch.nn.functional.pad(values[:, 1:], (0, 1))
    advantages = torch.where(response_mask, rewards + gamma * next_values - values, 0)
    reach = 1  # deltas that each A_t holds so far
    while reach < advantages.shape[1]:
        later = torch.nn.functional.pad(advantages[:, reach:], (0, reach))
        advantages = advantages + (gamma * gae_lambda) ** reach * later
        reach *= 2
    advantages = torch.where(response_mask, advantages, 0)
    return advantages, advantages + values


@torch.no_grad()
def rloo_advantages(scores: Float[Tensor, " batch"], *, responses_per_prompt: int) -> Float[Tensor, " batch"]:
    """Score minus the mean score of the prompt's other responses (REINFORCE leave-one-out, arXiv 2402.14740).

    The responses of a prompt are consecutive rows, at least two.
    """
    per_prompt = scores.view(-1, responses_per_prompt)
    others_mean = (per_prompt.sum(dim=1, keepdim=True) - per_prompt) / (responses_per_prompt - 1)
    return (per_prompt - others_mean).flatten()


@torch.no_grad()
def grpo_advantages(scores: Float[Tensor, " batch"], *, responses_per_prompt: int) -> Float[Tensor, " batch"]:
    """(score - mean) / (std + 1e-6) over the prompt's responses (GRPO, arXiv 2402.03300, section 4.1.2).

    std is unbiased, as in the implementations people compare with. The responses of a prompt are consecutive rows, at
    least two.
    """
    per_prompt = scores.view(-1, responses_per_prompt)
    std, mean = torch.std_mean(per_prompt, dim=1, keepdim=True)
    return ((per_prompt - mean) / (std + _STD_FLOOR)).flatten()
