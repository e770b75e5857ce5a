import math
import statistics

import pytest
import torch

from megatron_gil.algo.ppo import explained_variance, policy_loss, value_loss

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def tokens(dtype, seed=0):
    """Five [6, 4] tensors of both signs, spread beyond the clip range, and a mask."""
    generator = torch.Generator().manual_seed(seed)
    tensors = torch.randn(5, 6, 4, generator=generator, dtype=torch.float64) * 0.5
    return [t.to(dtype) for t in tensors], torch.rand(6, 4, generator=generator) < 0.7


@BOTH
def test_policy_loss_is_the_loop(dtype):
    (log_probs, old, advantages, *_), mask = tokens(dtype)
    loss = policy_loss(log_probs, old, advantages, mask, clip_range=0.2)
    total = clipped_tokens = approx_kl = ratios = 0.0
    for i, t in mask.nonzero().tolist():
        a = advantages[i, t].item()
        ratio = math.exp(log_probs[i, t].item() - old[i, t].item())
        bounded = min(max(ratio, 0.8), 1.2)
        total -= min(ratio * a, bounded * a)
        clipped_tokens += (ratio > 1.2 and a > 0) or (ratio < 0.8 and a < 0)
        approx_kl += ratio - 1 - math.log(ratio)
        ratios += ratio
    assert 0 < clipped_tokens < mask.sum()
    assert loss.total.dtype == dtype
    wanted = {"loss": total, "clip_fraction": clipped_tokens, "approx_kl": approx_kl, "ratio": ratios}
    assert {name: value.item() for name, value in loss.metrics.items()} == pytest.approx(
        {f"policy/{name}": value for name, value in wanted.items()}, rel=1e-5
    )
    assert loss.total.item() == loss.metrics["policy/loss"].item()


def test_policy_gradient_is_minus_ratio_times_advantage_where_not_clipped():
    (log_probs, old, advantages, *_), mask = tokens(torch.float64)
    log_probs.requires_grad_()
    policy_loss(log_probs, old, advantages, mask, clip_range=0.2).total.backward()
    assert log_probs.grad is not None
    for i in range(6):
        for t in range(4):
            ratio, a = math.exp(log_probs[i, t].item() - old[i, t].item()), advantages[i, t].item()
            clipped = (ratio > 1.2 and a > 0) or (ratio < 0.8 and a < 0)
            wanted = -ratio * a if mask[i, t] and not clipped else 0.0
            assert log_probs.grad[i, t].item() == pytest.approx(wanted, rel=1e-12)


def test_first_update_has_ratio_exactly_one():
    (log_probs, _, advantages, *_), mask = tokens(torch.float32)
    metrics = policy_loss(log_probs, log_probs.clone(), advantages, mask, clip_range=0.2).metrics
    assert metrics["policy/ratio"].item() == mask.sum().item()
    assert metrics["policy/approx_kl"].item() == metrics["policy/clip_fraction"].item() == 0


def test_wild_padding_gives_no_nan_gradient():
    (log_probs, old, advantages, *_), mask = tokens(torch.float32)
    wild = torch.where(mask, log_probs, 1e4).requires_grad_()
    loss = policy_loss(wild, old, advantages, mask, clip_range=0.2)
    loss.total.backward()
    assert wild.grad is not None
    assert wild.grad.isfinite().all()
    assert (wild.grad[~mask] == 0).all()
    assert all(value.isfinite() for value in loss.metrics.values())


@BOTH
def test_value_loss_is_the_loop(dtype):
    (values, old, returns, *_), mask = tokens(dtype, seed=1)
    loss = value_loss(values, old, returns, mask, value_clip_range=0.2)
    total = clipped_tokens = 0.0
    for i, t in mask.nonzero().tolist():
        v, v_old, r = values[i, t].item(), old[i, t].item(), returns[i, t].item()
        v_clip = v_old + min(max(v - v_old, -0.2), 0.2)
        total += 0.5 * max((v - r) ** 2, (v_clip - r) ** 2)
        clipped_tokens += (v_clip - r) ** 2 > (v - r) ** 2
    assert 0 < clipped_tokens < mask.sum()
    assert loss.total.item() == pytest.approx(total, rel=1e-5)
    assert loss.metrics["critic/value_loss"].item() == pytest.approx(total, rel=1e-5)
    assert loss.metrics["critic/clip_fraction"].item() == clipped_tokens


def test_metrics_carry_no_gradient():
    (a, b, c, *_), mask = tokens(torch.float32)
    a.requires_grad_()
    for loss in (
        policy_loss(a, b, c, mask, clip_range=0.2),
        value_loss(a, b, c, mask, value_clip_range=0.2),
    ):
        assert loss.total.requires_grad
        assert not any(value.requires_grad for value in loss.metrics.values())


def test_explained_variance(one_rank, on_ranks):
    (values, returns, *_), mask = tokens(torch.float64, seed=2)
    pairs = [(values[i, t].item(), returns[i, t].item()) for i, t in mask.nonzero().tolist()]
    wanted = 1 - statistics.pvariance([r - v for v, r in pairs]) / statistics.pvariance([r for _, r in pairs])
    assert explained_variance(values, returns, mask, all_sum=one_rank).item() == pytest.approx(wanted)
    assert explained_variance(returns, returns, mask, all_sum=one_rank).item() == 1
    assert explained_variance(values, torch.ones_like(returns), mask, all_sum=one_rank).item() == 0
    pieces = list(zip(values.split(4), returns.split(4), mask.split(4), strict=True))
    parts = on_ranks(lambda piece, all_sum: explained_variance(*piece, all_sum=all_sum).item(), pieces)
    assert parts == [pytest.approx(wanted)] * 2
