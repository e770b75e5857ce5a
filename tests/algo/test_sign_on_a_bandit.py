"""The sign trap on a softmax bandit: two prompts (the groups), a few actions, returns known, no sampling error.

Each action is drawn exactly as often as its probability says, so that batch means are expectations and the exact
variance of returns and its gradient can be had by autograd.
"""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_gil.algo.groups import group_statistics, invariance_weights

ACTIONS, DRAWS = 3, 24
COUNTS = st.lists(st.integers(1, 10), min_size=ACTIONS - 1, max_size=ACTIONS - 1)
RETURNS = st.lists(st.floats(0.5, 5), min_size=ACTIONS, max_size=ACTIONS)
BANDITS = given(counts=st.tuples(COUNTS, COUNTS), returns=st.tuples(RETURNS, RETURNS))
QUICK = settings(max_examples=60, deadline=None)


def group_returns(theta, returns):
    return (theta.softmax(1) * returns).sum(1)  # [2]


def variance(theta, returns):
    earned = group_returns(theta, returns)
    return ((earned - earned.mean()) ** 2).mean()


def bandit(counts, returns):
    """(theta, returns of every arm, and of the batch: prompt, action)."""
    draws = torch.tensor([[*c, DRAWS - sum(c)] for c in counts])
    theta = draws.double().log()
    arms = torch.tensor(returns, dtype=torch.float64)
    prompts = torch.arange(2).repeat_interleave(DRAWS)
    actions = torch.cat([torch.arange(ACTIONS).repeat_interleave(n) for n in draws])
    return theta, arms, prompts, actions


def penalty_step(counts, returns, group_value):
    """(theta, arms, exact gradient of the variance, direction the penalty moves theta in)."""
    theta, arms, prompts, actions = bandit(counts, returns)
    theta.requires_grad_()
    log_probs = theta.log_softmax(1)[prompts, actions]
    earned = arms[prompts, actions]
    probs = torch.nn.functional.one_hot(prompts, 2).double()
    values = earned if group_value == "return" else log_probs.detach() * earned
    stats = group_statistics(probs, values, all_sum=torch.clone)
    omega = invariance_weights(probs, stats, invariance_coef=1.0)
    (direction,) = torch.autograd.grad(((omega - 1) * earned * log_probs).mean(), theta)
    (exact,) = torch.autograd.grad(variance(theta, arms), theta)
    return theta.detach(), arms, exact, direction


@QUICK
@BANDITS
def test_the_penalty_is_minus_the_gradient_of_the_variance_and_a_step_shrinks_it(counts, returns):
    theta, arms, exact, direction = penalty_step(counts, returns, "return")
    torch.testing.assert_close(direction, -exact, rtol=1e-10, atol=1e-12)
    assume(exact.norm() > 1e-3)
    assert variance(theta + 1e-3 * direction, arms) < variance(theta, arms)


def test_the_printed_value_widens_the_gap():
    """`weighted_log_prob` orders the groups by sum log pi * R. Here: cosine with the variance's gradient +1, not -1."""
    counts, returns = ([8, 8], [8, 8]), ([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    theta, arms, exact, right = penalty_step(counts, returns, "return")
    _, _, _, printed = penalty_step(counts, returns, "weighted_log_prob")
    cosines = [torch.cosine_similarity(x.flatten(), exact.flatten(), dim=0).item() for x in (right, printed)]
    assert cosines == [pytest.approx(-1, abs=1e-12), pytest.approx(1, abs=1e-12)]
    before = variance(theta, arms)
    assert variance(theta + 0.01 * right, arms) < before < variance(theta + 0.01 * printed, arms)


def test_the_printed_value_is_wrong_in_nearly_every_random_bandit():
    """Returns all positive, one prompt easier than the other: the step widens the gap in 300 of 300."""
    generator = torch.Generator().manual_seed(0)
    wrong = {"return": 0, "weighted_log_prob": 0}
    for _ in range(300):
        counts = torch.randint(4, 10, (2, ACTIONS - 1), generator=generator).tolist()
        returns = (torch.rand(2, ACTIONS, generator=generator) * 4 + torch.tensor([[0.0], [4.0]])).tolist()
        for group_value in wrong:
            theta, arms, _, direction = penalty_step(counts, returns, group_value)
            wrong[group_value] += bool(variance(theta + 1e-4 * direction, arms) > variance(theta, arms))
    assert wrong["return"] == 0
    assert wrong["weighted_log_prob"] > 270, wrong


def test_following_omega_closes_the_gap_between_groups_while_plain_ascent_leaves_it():
    """Full objective, E[R] - beta R_var, from equal starts: the easy prompt pays more per unit of probability."""
    arms = torch.tensor([[0.0, 0.0, 3.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    gaps = {}
    for beta in (0.0, 1.0):
        theta = torch.zeros(2, 3, dtype=torch.float64)
        for _ in range(20):
            pi = theta.softmax(1)
            stats = group_statistics(torch.eye(2, dtype=torch.float64), (pi * arms).sum(1), all_sum=torch.clone)
            omega = invariance_weights(torch.eye(2, dtype=torch.float64), stats, invariance_coef=beta)
            theta = theta + 0.5 * omega[:, None] * pi * (arms - (pi * arms).sum(1, keepdim=True)) / 2
        earned = group_returns(theta, arms)
        gaps[beta] = (earned[0] - earned[1]).item()
    assert 0 < gaps[1.0] < 0.5 * gaps[0.0], gaps
