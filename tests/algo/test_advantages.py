import math
import statistics

import pytest
import torch

from megatron_gil.algo.advantages import gae, grpo_advantages, rloo_advantages, shape_rewards

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
SPANS = [(2, 5), (0, 1), (3, 8), (4, 4), (0, 8)]  # response columns of each row; row 3 has no response


def rollout(dtype):
    generator = torch.Generator().manual_seed(0)
    log_probs, ref_log_probs, values = -torch.rand(3, 5, 8, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[start <= t < end for t in range(8)] for start, end in SPANS])
    scores = torch.randn(5, generator=generator, dtype=torch.float64)
    return scores.to(dtype), log_probs.to(dtype), ref_log_probs.to(dtype), values.to(dtype), mask


@BOTH
def test_shaped_rewards_are_the_loop(dtype):
    scores, log_probs, ref_log_probs, _, mask = rollout(dtype)
    weights = torch.tensor([1.0, 0.0, 4.0, 0.5, 0.7], dtype=dtype)
    rewards = shape_rewards(scores, log_probs, ref_log_probs, mask, kl_coef=0.3, kl_weights=weights)
    assert rewards.dtype == dtype
    for i, (start, end) in enumerate(SPANS):
        for t in range(8):
            wanted = 0.0
            if start <= t < end:
                wanted = -0.3 * weights[i].item() * (log_probs[i, t].item() - ref_log_probs[i, t].item())
                wanted += scores[i].item() if t == end - 1 else 0.0
                wanted /= max(1.0, weights[i].item())
            assert rewards[i, t].item() == pytest.approx(wanted, rel=1e-6, abs=1e-7)


def test_p_high_one_is_ppo_with_kl_and_zero_is_ppo_without_bitwise():
    scores, log_probs, ref_log_probs, _, mask = rollout(torch.float32)

    def shape(kl_coef, p_high):
        weights = torch.full((5,), p_high)
        return shape_rewards(scores, log_probs, ref_log_probs, mask, kl_coef=kl_coef, kl_weights=weights)

    plain = torch.where(mask, -0.3 * (log_probs - ref_log_probs), 0)
    for i, (start, end) in enumerate(SPANS):
        if end > start:
            plain[i, end - 1] += scores[i]
    assert torch.equal(shape(0.3, 1.0), plain)
    assert torch.equal(shape(0.3, 0.0), shape(0.0, 1.0))
    assert not torch.equal(shape(0.3, 1.0), shape(0.3, 0.0))


def test_no_gradient_reaches_the_policy_or_the_classifier_through_rewards_and_advantages():
    scores, log_probs, ref_log_probs, values, mask = rollout(torch.float32)
    p_high = torch.full((5,), 0.5, requires_grad=True)
    log_probs.requires_grad_()
    values.requires_grad_()
    rewards = shape_rewards(scores, log_probs, ref_log_probs, mask, kl_coef=0.3, kl_weights=p_high)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, gae_lambda=0.95)
    assert not any(x.requires_grad for x in (rewards, advantages, returns))


def test_padding_of_the_log_probs_does_not_matter():
    scores, log_probs, ref_log_probs, _, mask = rollout(torch.float32)
    clean = shape_rewards(scores, log_probs, ref_log_probs, mask, kl_coef=0.3, kl_weights=torch.ones(5))
    dirty = torch.where(mask, log_probs, math.nan)
    assert torch.equal(shape_rewards(scores, dirty, ref_log_probs, mask, kl_coef=0.3, kl_weights=torch.ones(5)), clean)


@BOTH
@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.7, 0.0), (0.0, 1.0)])
def test_gae_is_the_double_sum(dtype, gamma, gae_lambda):
    """The oracle sums (gamma lambda)^l delta_{t+l} for every t by itself: no recursion to share a mistake with."""
    _, rewards, _, values, mask = rollout(dtype)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda)
    assert advantages.dtype == returns.dtype == dtype
    for i, (start, end) in enumerate(SPANS):
        r, v = rewards[i].tolist(), values[i].tolist()
        for t in range(8):
            wanted = 0.0
            if start <= t < end:
                for u in range(t, end):
                    delta = r[u] + gamma * (v[u + 1] if u + 1 < end else 0.0) - v[u]
                    wanted += (gamma * gae_lambda) ** (u - t) * delta
            inside = start <= t < end
            assert advantages[i, t].item() == pytest.approx(wanted, rel=1e-5, abs=1e-6)
            assert returns[i, t].item() == pytest.approx(wanted + v[t] if inside else 0.0, rel=1e-5, abs=1e-6)


def test_lambda_one_gives_rewards_to_go_as_returns():
    _, rewards, _, values, mask = rollout(torch.float64)
    _, returns = gae(rewards, values, mask, gamma=1.0, gae_lambda=1.0)
    for i, (start, end) in enumerate(SPANS):
        for t in range(start, end):
            assert returns[i, t].item() == pytest.approx(math.fsum(rewards[i, t:end].tolist()))


def test_gae_does_not_see_values_or_rewards_outside_the_response():
    _, rewards, _, values, mask = rollout(torch.float32)
    clean = gae(rewards, values, mask, gamma=0.9, gae_lambda=0.9)
    dirty = gae(
        torch.where(mask, rewards, math.nan), torch.where(mask, values, math.inf), mask, gamma=0.9, gae_lambda=0.9
    )
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[1], dirty[1])


@BOTH
def test_critic_free_advantages_are_the_loops(dtype):
    scores = torch.randn(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    rloo = rloo_advantages(scores, responses_per_prompt=4)
    grpo = grpo_advantages(scores, responses_per_prompt=4)
    assert rloo.dtype == grpo.dtype == dtype
    for i in range(12):
        prompt = scores[i // 4 * 4 : i // 4 * 4 + 4].tolist()
        others = [s for j, s in enumerate(prompt) if j != i % 4]
        assert rloo[i].item() == pytest.approx(prompt[i % 4] - statistics.fmean(others), rel=1e-5, abs=1e-6)
        wanted = (prompt[i % 4] - statistics.fmean(prompt)) / (statistics.stdev(prompt) + 1e-6)
        assert grpo[i].item() == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_equal_scores_of_a_prompt_teach_nothing():
    assert (rloo_advantages(torch.full((4,), 2.0), responses_per_prompt=2) == 0).all()
    assert (grpo_advantages(torch.full((4,), 2.0), responses_per_prompt=2) == 0).all()
