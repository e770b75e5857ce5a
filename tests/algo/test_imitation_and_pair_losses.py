import math

import pytest
import torch

from megatron_gil.algo.likelihood import token_nll
from megatron_gil.algo.preference import dpo_loss, pairwise_loss

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def pairs(dtype, seed=0):
    x = torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) * 2
    x[0, 3] = x[0, 3, 0]  # a tie
    return x[0], x[1]


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


@BOTH
def test_token_nll_is_the_loop(dtype):
    log_probs = -torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    loss = token_nll(log_probs, mask)
    wanted = -math.fsum(log_probs[i, t].item() for i in range(3) for t in range(4) if mask[i, t])
    assert loss.total.item() == pytest.approx(wanted, rel=1e-6)
    assert loss.metrics["sft/loss"].item() == loss.total.item()


@BOTH
def test_pairwise_loss_is_the_loop(dtype):
    scores, _ = pairs(dtype)
    loss = pairwise_loss(scores)
    margins = [chosen - rejected for chosen, rejected in scores.tolist()]
    assert loss.total.item() == pytest.approx(-math.fsum(map(log_sigmoid, margins)), rel=1e-5)
    assert loss.metrics["reward/loss"].item() == loss.total.item()
    assert loss.metrics["reward/margin"].item() == pytest.approx(math.fsum(margins), rel=1e-5)
    assert loss.metrics["reward/accuracy"].item() == sum(1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in margins)


def test_centring_is_the_loop_and_leaves_the_metrics_alone():
    scores, _ = pairs(torch.float64)
    plain, centred = pairwise_loss(scores), pairwise_loss(scores, center_coef=0.3)
    penalty = 0.3 * math.fsum((chosen + rejected) ** 2 for chosen, rejected in scores.tolist())
    assert centred.total.item() == pytest.approx(plain.total.item() + penalty, rel=1e-12)
    assert centred.metrics == plain.metrics
    assert plain.metrics["reward/mean_score"].item() == pytest.approx(math.fsum(map(math.fsum, scores.tolist())) / 2)


def test_accuracy_can_fail():
    """Swapped labels give exactly 1 - accuracy; a constant model 0.5; NaN scores 0."""
    scores, _ = pairs(torch.float32)

    def accuracy(scores):
        return pairwise_loss(scores).metrics["reward/accuracy"].item() / 6

    assert accuracy(scores.flip(1)) == 1 - accuracy(scores)
    assert accuracy(scores) != 0.5
    assert accuracy(torch.zeros(6, 2)) == 0.5
    assert accuracy(torch.full((6, 2), math.nan)) == 0


def test_pairwise_gradient_stays_finite_for_extreme_margins():
    scores = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    pairwise_loss(scores).total.backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [[0, 0], [-1, 1]]


@BOTH
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.5])
def test_dpo_loss_is_the_loop(dtype, label_smoothing):
    policy, ref = pairs(dtype, seed=1)
    loss = dpo_loss(policy, ref, beta=0.3, label_smoothing=label_smoothing)
    total = margins = chosen_rewards = rejected_rewards = accuracy = 0.0
    for (pc, pr), (rc, rr) in zip(policy.tolist(), ref.tolist(), strict=True):
        h = 0.3 * ((pc - rc) - (pr - rr))
        total -= (1 - label_smoothing) * log_sigmoid(h) + label_smoothing * log_sigmoid(-h)
        margins, accuracy = margins + h, accuracy + (h > 0)
        chosen_rewards, rejected_rewards = chosen_rewards + 0.3 * (pc - rc), rejected_rewards + 0.3 * (pr - rr)
    wanted = {
        "dpo/loss": total,
        "dpo/margin": margins,
        "dpo/accuracy": accuracy,
        "dpo/chosen_reward": chosen_rewards,
        "dpo/rejected_reward": rejected_rewards,
    }
    assert {name: value.item() for name, value in loss.metrics.items()} == pytest.approx(wanted, rel=1e-4)


def test_dpo_starts_at_log_two_where_the_policy_is_the_reference():
    policy, _ = pairs(torch.float64)
    loss = dpo_loss(policy, policy, beta=0.1, label_smoothing=0.0)
    assert loss.total.item() == pytest.approx(6 * math.log(2))
    assert loss.metrics["dpo/accuracy"].item() == 3
