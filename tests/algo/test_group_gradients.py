"""omega and c against central finite differences of the quantity they claim to be the gradient of, in float64.

Steps of 1e-5 leave an error near 1e-10 of the gradient: curvature and round-off meet there.
"""

import pytest
import torch

from megatron_gil.algo.groups import classifier_coefs, classifier_loss, group_statistics, invariance_weights
from megatron_gil.algo.ppo import policy_loss

ROWS, ACTIONS, STEP = 24, 5, 1e-5


def finite_differences(function, x):
    gradient = torch.zeros_like(x)
    for k in range(x.numel()):
        e = torch.zeros(x.numel(), dtype=x.dtype)
        e[k] = STEP
        gradient.view(-1)[k] = (function(x + e.view_as(x)) - function(x - e.view_as(x))) / (2 * STEP)
    return gradient


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


def variance_by_loop(weights, returns, counts):
    """R_var over the groups in `counts`, plain Python."""
    group_returns = []
    for g, takes_part in enumerate(counts):
        if takes_part:
            w = weights[:, g].tolist()
            group_returns.append(sum(a * b for a, b in zip(w, returns.tolist(), strict=True)) / sum(w))
    mean = sum(group_returns) / len(group_returns)
    return sum((j - mean) ** 2 for j in group_returns) / len(group_returns)


def batch(num_groups, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(ROWS, num_groups, generator=generator, dtype=torch.float64)
    returns = torch.randn(ROWS, generator=generator, dtype=torch.float64) + logits[:, 0]
    return logits, returns


@pytest.mark.parametrize("num_groups", [2, 3, 4])
def test_classifier_gradient_is_that_of_minus_the_variance(num_groups):
    logits, returns = batch(num_groups)
    probs = logits.softmax(1)
    stats = group_statistics(probs, returns, all_sum=torch.clone)
    phi = logits.clone().requires_grad_()
    classifier_loss(phi, classifier_coefs(probs, returns, stats)).backward()
    wanted = finite_differences(lambda x: -variance_by_loop(x.softmax(1), returns, [True] * num_groups), logits)
    assert relative_error(phi.grad, wanted) < 1e-8


def test_classifier_gradient_with_a_group_left_out():
    logits, returns = batch(3)
    logits[:, 2] -= 6
    probs = logits.softmax(1)
    stats = group_statistics(probs, returns, all_sum=torch.clone)
    assert stats.counts.tolist() == [True, True, False]
    phi = logits.clone().requires_grad_()
    classifier_loss(phi, classifier_coefs(probs, returns, stats)).backward()
    wanted = finite_differences(lambda x: -variance_by_loop(x.softmax(1), returns, [True, True, False]), logits)
    assert relative_error(phi.grad, wanted) < 1e-8


@pytest.mark.parametrize("num_groups", [2, 3])
def test_balance_gradient_is_that_of_the_divergence_from_uniform(num_groups):
    """With equal returns the variance is silent and only balance_coef * KL(mean_i w_i || uniform) is left."""
    logits, _ = batch(num_groups)
    returns = torch.ones(ROWS, dtype=torch.float64)
    probs = logits.softmax(1)
    stats = group_statistics(probs, returns, all_sum=torch.clone)
    phi = logits.clone().requires_grad_()
    classifier_loss(phi, classifier_coefs(probs, returns, stats, balance_coef=0.7)).backward()

    def divergence(x):
        shares = x.softmax(1).mean(0)
        return 0.7 * (shares * (shares * num_groups).log()).sum()

    assert relative_error(phi.grad, finite_differences(divergence, logits)) < 1e-8


@pytest.mark.parametrize("num_groups", [2, 3, 4])
def test_policy_gradient_is_that_of_return_minus_variance(num_groups):
    """Through the shipped PPO loss: E[R] and J_g as importance-weighted means, masses held fixed, theta finite."""
    logits, returns = batch(num_groups, seed=1)
    probs = logits.softmax(1)
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(ROWS, 3, ACTIONS, generator=generator, dtype=torch.float64)
    actions = torch.randint(ACTIONS, (ROWS, 1), generator=generator)
    theta = torch.randn(3, generator=generator, dtype=torch.float64)
    beta = 0.8

    def log_probs(theta):
        return torch.einsum("k,bka->ba", theta, features).log_softmax(1).gather(1, actions)  # [B, 1]: one token a row

    old = log_probs(theta)

    def objective(theta):
        earned = returns * (log_probs(theta) - old).exp()[:, 0]
        group_returns = (probs * earned[:, None]).sum(0) / probs.sum(0)
        return earned.mean() - beta * ((group_returns - group_returns.mean()) ** 2).mean()

    stats = group_statistics(probs, returns, all_sum=torch.clone)
    omega = invariance_weights(probs, stats, invariance_coef=beta)
    parameter = theta.clone().requires_grad_()
    loss = policy_loss(
        log_probs(parameter), old, (omega * returns)[:, None], torch.ones(ROWS, 1, dtype=torch.bool), clip_range=0.2
    )
    (-loss.total / ROWS).backward()
    assert relative_error(parameter.grad, finite_differences(objective, theta)) < 1e-8
    penalty_free = finite_differences(lambda t: (returns * (log_probs(t) - old).exp()[:, 0]).mean(), theta)
    assert relative_error(parameter.grad, penalty_free) > 0.1  # the penalty is really in it


@pytest.mark.parametrize("num_groups", [2, 3, 4])
def test_a_zero_head_never_moves(num_groups):
    """A documented fact: equal logits are an exact stationary point (zero up to the rounding of 1/M)."""
    _, returns = batch(num_groups)
    logits = torch.zeros(ROWS, num_groups, dtype=torch.float64, requires_grad=True)
    probs = logits.detach().softmax(1)
    stats = group_statistics(probs, returns, all_sum=torch.clone)
    classifier_loss(logits, classifier_coefs(probs, returns, stats)).backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() <= (0 if num_groups == 2 else 1e-16)


def test_a_head_off_zero_grows_the_variance():
    """Following the classifier's gradient from a small head raises R_var, the more the longer."""
    hidden = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    returns = hidden[:, 0] * 2
    head = torch.tensor([[0.01, -0.01]] * 4, dtype=torch.float64)
    variances = []
    for _ in range(5):
        phi = head.clone().requires_grad_()
        probs = (hidden @ phi).softmax(1)
        stats = group_statistics(probs.detach(), returns, all_sum=torch.clone)
        variances.append(stats.variance)
        classifier_loss(hidden @ phi, classifier_coefs(probs.detach(), returns, stats)).backward()
        assert phi.grad is not None
        head = head - 0.5 * phi.grad
    assert variances == sorted(variances)
    assert variances[-1] > 100 * variances[0]
