import math

import pytest
import torch

from megatron_gil.algo.kl import MAX_FACTOR, KlController, k1, k3


def test_estimators_are_their_formulas():
    log_p, log_q = torch.tensor([[-0.5, -2.0]], dtype=torch.float64), torch.tensor([[-1.0, -0.25]], dtype=torch.float64)
    ratios = [math.exp(-1.0 + 0.5), math.exp(-0.25 + 2.0)]  # ref / pi
    assert k1(log_p, log_q)[0].tolist() == pytest.approx([-math.log(r) for r in ratios])
    assert k3(log_p, log_q)[0].tolist() == pytest.approx([r - 1 - math.log(r) for r in ratios])


def test_expectations_under_the_policy():
    """k1 and k3 average to the KL exactly."""
    logits = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_p, log_q = (logits[0]).log_softmax(0), (logits[0] + 0.1 * logits[1]).log_softmax(0)
    exact = (log_p.exp() * (log_p - log_q)).sum()
    means = [(log_p.exp() * estimator(log_p[None], log_q[None])[0]).sum() for estimator in (k1, k3)]
    assert means[0].item() == pytest.approx(exact.item(), rel=1e-12)
    assert means[1].item() == pytest.approx(exact.item(), rel=1e-12)


def test_k3_of_nearly_equal_policies_keeps_its_digits_in_float32():
    """exp(x) - 1 - x would be rounding noise of either sign at x = 1e-3, where k3 is 5e-7."""
    log_p = torch.linspace(-9, -0.1, 500)[None]
    log_q = log_p + 1e-3
    estimates = k3(log_p, log_q)
    assert (estimates >= 0).all()
    torch.testing.assert_close(estimates.double(), k3(log_p.double(), log_q.double()), rtol=1e-3, atol=0)


def test_a_controller_follows_its_equation():
    control = KlController(target=2.0)
    assert control.update(2.0).factor == 1.0
    assert control.update(2.5).factor == pytest.approx(1 + 0.2 * 0.25)
    assert control.update(0.0).factor == control.update(-7.0).factor == pytest.approx(0.9)
    assert control.update(1e9).factor == pytest.approx(1.1)
    assert control.update(2.5).update(2.5).factor == pytest.approx(1.05**2)
    assert control.update(math.nan) == control.update(math.inf) == control


def test_a_controller_has_bounds_and_comes_back_from_them():
    control = KlController(target=1.0)
    for _ in range(1000):
        control = control.update(5.0)
    assert control.factor == MAX_FACTOR
    assert control.update(0.0).factor < MAX_FACTOR
    for _ in range(1000):
        control = control.update(0.0)
    assert control.factor == 1 / MAX_FACTOR


def test_a_controller_holds_a_kl_that_answers_to_its_coefficient():
    """KL = 1 / factor, approached slowly as a policy does."""
    control, kl = KlController(target=0.25), 0.0
    for _ in range(300):
        kl += 0.1 * (1 / control.factor - kl)
        control = control.update(kl)
    assert kl == pytest.approx(0.25, rel=0.02)
