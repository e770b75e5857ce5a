"""The statistics, omega and c of the method against plain loops, and everything they must not depend on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gil.algo.groups import classifier_coefs, classifier_loss, group_statistics, invariance_weights
from megatron_gil.algo.ppo import policy_loss

ONE_RANK = torch.clone
BATCHES = given(seed=st.integers(0, 10_000), rows=st.integers(8, 40), num_groups=st.integers(2, 4))
QUICK = settings(max_examples=30, deadline=None)


def batch(seed, rows, num_groups, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, num_groups, generator=generator, dtype=torch.float64)
    returns = torch.randn(rows, generator=generator, dtype=torch.float64) * 2 + logits[:, 0]
    return logits.softmax(1).to(dtype), returns.to(dtype)


def statistics_by_loop(probs, returns, min_group_mass=0.02):
    """(masses, group returns, which count, Jbar, R_var) in plain Python."""
    rows, num_groups = probs.shape
    w, r = probs.tolist(), returns.tolist()
    mass = [sum(w[i][g] for i in range(rows)) for g in range(num_groups)]
    earned = [sum(w[i][g] * r[i] for i in range(rows)) / mass[g] if mass[g] > 0 else 0.0 for g in range(num_groups)]
    counts = [m >= max(min_group_mass * rows, 1) for m in mass]
    counted = [j for j, c in zip(earned, counts, strict=True) if c]
    mean = sum(counted) / len(counted) if counted else 0.0
    variance = sum((j - mean) ** 2 for j in counted) / len(counted) if counted else 0.0
    return mass, earned, counts, mean, variance


def omega_and_c_by_loop(probs, returns, beta, min_group_mass=0.02):
    mass, earned, counts, mean, _ = statistics_by_loop(probs, returns, min_group_mass)
    rows, num_groups = probs.shape
    omega, c = [], []
    for i in range(rows):
        penalty, c_i = 0.0, []
        for g in range(num_groups):
            slope = 2 / sum(counts) * (earned[g] - mean) / mass[g] if counts[g] else 0.0
            penalty += slope * probs[i, g].item()
            c_i.append(slope * (returns[i].item() - earned[g]))
        omega.append(1 - beta * rows * penalty)
        c.append(c_i)
    return torch.tensor(omega, dtype=torch.float64), torch.tensor(c, dtype=torch.float64)


@QUICK
@BATCHES
def test_statistics_omega_and_c_are_the_loops(seed, rows, num_groups):
    probs, returns = batch(seed, rows, num_groups)
    stats = group_statistics(probs, returns, all_sum=ONE_RANK)
    mass, earned, counts, mean, variance = statistics_by_loop(probs, returns)
    assert stats.num_rows == rows
    assert stats.mass.tolist() == pytest.approx(mass, rel=1e-12)
    assert stats.group_return.tolist() == pytest.approx(earned, rel=1e-10)
    assert stats.counts.tolist() == counts
    assert (stats.mean_return, stats.variance) == pytest.approx((mean, variance), rel=1e-9, abs=1e-14)
    omega, c = omega_and_c_by_loop(probs, returns, beta=0.3)
    torch.testing.assert_close(invariance_weights(probs, stats, invariance_coef=0.3), omega, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(classifier_coefs(probs, returns, stats), c, rtol=1e-10, atol=1e-12)


@QUICK
@BATCHES
def test_omega_averages_one(seed, rows, num_groups):
    probs, returns = batch(seed, rows, num_groups)
    omega = invariance_weights(probs, group_statistics(probs, returns, all_sum=ONE_RANK), invariance_coef=0.7)
    assert omega.mean().item() == pytest.approx(1, abs=1e-12)


def test_two_equal_groups_weigh_one_minus_and_plus_beta_times_the_gap():
    probs = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    stats = group_statistics(probs, torch.tensor([3.0, 5.0, 1.0, 2.0]), all_sum=ONE_RANK)  # gap 4 - 1.5
    assert invariance_weights(probs, stats, invariance_coef=0.1).tolist() == pytest.approx([0.75, 0.75, 1.25, 1.25])
    assert stats.variance == 1.25**2  # torch.var, unbiased, would say twice this
    floored = invariance_weights(probs, stats, invariance_coef=1.0, weight_floor=0.2)
    assert floored.tolist() == pytest.approx([0.2, 0.2, 3.5, 3.5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("num_groups", "beta"), [(2, 0.0), (4, 0.0), (1, 0.7)])
def test_beta_zero_or_one_group_is_ppo_bit_for_bit(dtype, num_groups, beta):
    probs, returns = batch(1, 32, num_groups, dtype)
    stats = group_statistics(probs, returns, all_sum=ONE_RANK)
    omega = invariance_weights(probs, stats, invariance_coef=beta)
    assert torch.equal(omega, torch.ones(32, dtype=dtype))
    generator = torch.Generator().manual_seed(2)
    old, advantages, noise = torch.randn(3, 32, 6, generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.rand(32, 6, generator=generator) < 0.8
    gradients = []
    for a in (advantages, omega[:, None] * advantages):
        log_probs = (old + 0.3 * noise).requires_grad_()
        policy_loss(log_probs, old, a, mask, clip_range=0.2).total.backward()
        gradients.append(log_probs.grad)
    assert torch.equal(*gradients)
    if num_groups == 1:
        assert stats.variance == 0
        assert (classifier_coefs(probs, returns, stats) == 0).all()


CUTS = given(
    seed=st.integers(0, 10_000), num_groups=st.integers(2, 4), cut=st.lists(st.integers(0, 12), min_size=1, max_size=4)
)


@QUICK
@CUTS
def test_same_omega_and_c_for_any_cut_into_ranks_and_microbatches(seed, num_groups, cut, on_ranks):
    rows = sum(cut) + 8
    cut = [*cut, 8]
    probs, returns = batch(seed, rows, num_groups)
    whole = group_statistics(probs, returns, all_sum=ONE_RANK)

    def settle(piece, all_sum):
        stats = group_statistics(*piece, all_sum=all_sum)
        microbatches = zip(piece[0].split(3), piece[1].split(3), strict=True)
        cs = [classifier_coefs(p, r, stats, balance_coef=0.2) for p, r in microbatches]
        return stats, invariance_weights(piece[0], stats, invariance_coef=0.3), torch.cat(cs)

    calls = []
    pieces = list(zip(probs.split(cut), returns.split(cut), strict=True))
    stats, omegas, cs = zip(*on_ranks(settle, pieces, calls), strict=True)
    assert calls == [((2 * num_groups + 1,), torch.float64)]  # one collective, on every rank
    for other in stats:
        assert other.num_rows == rows
        assert torch.equal(other.mass, stats[0].mass)
        assert torch.equal(other.group_return, stats[0].group_return)
        assert (other.mean_return, other.variance) == (stats[0].mean_return, stats[0].variance)
    omega = invariance_weights(probs, whole, invariance_coef=0.3)
    c = classifier_coefs(probs, returns, whole, balance_coef=0.2)
    torch.testing.assert_close(torch.cat(omegas), omega, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(torch.cat(cs), c, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("num_groups", [2, 3])
def test_swapping_labels_permutes_and_changes_nothing_else(num_groups):
    probs, returns = batch(7, 24, num_groups)
    order = torch.arange(num_groups).roll(1)
    stats, swapped = (group_statistics(p, returns, all_sum=ONE_RANK) for p in (probs, probs[:, order]))
    assert torch.equal(swapped.mass, stats.mass[order])
    assert torch.equal(swapped.group_return, stats.group_return[order])
    assert swapped.variance == pytest.approx(stats.variance, rel=1e-14)
    rtol, atol = (0.0, 0.0) if num_groups == 2 else (1e-13, 1e-14)  # a + b = b + a, no more
    torch.testing.assert_close(
        invariance_weights(probs[:, order], swapped, invariance_coef=0.5),
        invariance_weights(probs, stats, invariance_coef=0.5),
        rtol=rtol,
        atol=atol,
    )
    torch.testing.assert_close(
        classifier_coefs(probs[:, order], returns, swapped, balance_coef=0.1),
        classifier_coefs(probs, returns, stats, balance_coef=0.1)[:, order],
        rtol=rtol,
        atol=atol,
    )


@QUICK
@given(seed=st.integers(0, 10_000), shift=st.floats(-1e3, 1e3))
def test_a_constant_added_to_every_return_changes_nothing(seed, shift):
    probs, returns = batch(seed, 20, 2)
    results = []
    for r in (returns, returns + shift):
        stats = group_statistics(probs, r, all_sum=ONE_RANK)
        results.append((invariance_weights(probs, stats, invariance_coef=0.5), classifier_coefs(probs, r, stats)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("balance_coef", [0.0, 0.1])
def test_an_empty_group_gives_omega_one_and_no_nan(balance_coef):
    probs = torch.tensor([[1.0, 0.0]] * 6)
    returns = torch.arange(6.0)
    stats = group_statistics(probs, returns, all_sum=ONE_RANK)
    assert stats.counts.tolist() == [True, False]
    assert stats.group_return.tolist() == [2.5, 0.0]
    assert (stats.mean_return, stats.variance) == (2.5, 0.0)
    assert torch.equal(invariance_weights(probs, stats, invariance_coef=0.5), torch.ones(6))
    coefs = classifier_coefs(probs, returns, stats, balance_coef=balance_coef)
    assert coefs.isfinite().all()
    assert (coefs == 0).all() == (balance_coef == 0)


def test_where_no_group_counts_nothing_happens():
    probs, returns = torch.tensor([[0.5, 0.5]]), torch.tensor([3.0])
    stats = group_statistics(probs, returns, all_sum=ONE_RANK)  # half a row each
    assert stats.counts.tolist() == [False, False]
    assert (stats.mean_return, stats.variance) == (0.0, 0.0)
    assert invariance_weights(probs, stats, invariance_coef=0.5).tolist() == [1.0]
    assert classifier_coefs(probs, returns, stats).tolist() == [[0.0, 0.0]]


def test_a_tiny_group_is_left_out_of_omega_and_c():
    """Three groups, the last with 1.2 of 100 rows, below 2 %: the other two are weighed as if it were not there."""
    generator = torch.Generator().manual_seed(3)
    two = torch.randn(100, 2, generator=generator, dtype=torch.float64).softmax(1)
    probs = torch.cat([two * (1 - 0.012), torch.full((100, 1), 0.012, dtype=torch.float64)], dim=1)
    returns = torch.randn(100, generator=generator, dtype=torch.float64)
    stats = group_statistics(probs, returns, all_sum=ONE_RANK)
    assert stats.counts.tolist() == [True, True, False]
    alone = group_statistics(probs[:, :2], returns, all_sum=ONE_RANK)
    assert stats.variance == alone.variance
    coefs = classifier_coefs(probs, returns, stats)
    assert torch.equal(coefs[:, :2], classifier_coefs(probs[:, :2], returns, alone))
    assert (coefs[:, 2] == 0).all()
    omega = invariance_weights(probs, stats, invariance_coef=0.5)
    assert torch.equal(omega, invariance_weights(probs[:, :2], alone, invariance_coef=0.5))
    assert omega.mean().item() == pytest.approx(1, abs=1e-13)
    all_count = group_statistics(probs, returns, all_sum=ONE_RANK, min_group_mass=0.01)
    assert all_count.counts.tolist() == [True, True, True]


def test_nothing_but_the_classifier_loss_carries_a_gradient():
    probs, returns = batch(4, 16, 2)
    probs.requires_grad_()
    returns.requires_grad_()
    stats = group_statistics(probs, returns, all_sum=ONE_RANK)
    constants = [
        stats.mass,
        stats.group_return,
        invariance_weights(probs, stats, invariance_coef=0.5),
        classifier_coefs(probs, returns, stats, balance_coef=0.1),
    ]
    assert not any(tensor.requires_grad for tensor in constants)
    logits = torch.zeros(16, 2, requires_grad=True)
    classifier_loss(logits, constants[-1]).backward()
    assert logits.grad is not None
    assert probs.grad is None
    assert returns.grad is None


def test_classifier_loss_is_the_loop():
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    coefs = torch.randn(5, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    total = 0.0
    for i in range(5):
        exps = [x.exp().item() for x in logits[i]]
        total -= sum(coefs[i, g].item() * exps[g] / sum(exps) for g in range(3))
    assert classifier_loss(logits, coefs).item() == pytest.approx(total, rel=1e-13)
    assert classifier_loss(logits.bfloat16(), coefs.float()).dtype == torch.float32
