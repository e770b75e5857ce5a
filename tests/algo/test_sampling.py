"""Penalty, temperature, top-k, top-p and the inverse distribution function, against a slow plain-Python oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gil.algo.sampling import choose_tokens, keep_top_k, keep_top_p, penalize_repetition
from tests.sampling_oracle import choose, penalize

INF = float("inf")


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.3, 0.8, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, 10, 50]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.05]),
)
def test_choices_are_the_oracles(seed: int, temperature: float, top_k: int, top_p: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(8, 11, generator=generator) * 3
    uniforms = torch.rand(8, generator=generator)
    tokens, log_probs = choose_tokens(logits, uniforms, temperature=temperature, top_k=top_k, top_p=top_p)
    for row in range(8):
        token, log_prob = choose(logits[row].tolist(), float(uniforms[row]), temperature, top_k, top_p)
        assert int(tokens[row]) == token
        assert float(log_probs[row]) == pytest.approx(log_prob, abs=1e-5)  # logits / temperature in float32


def test_frequencies_are_the_probabilities() -> None:
    """An even comb of uniforms must choose each token as often as its probability says, to one tooth."""
    logits, count = torch.randn(1, 7, generator=torch.Generator().manual_seed(1)), 4096
    uniforms = (torch.arange(count) + 0.5) / count
    tokens, _ = choose_tokens(logits.expand(count, 7), uniforms, temperature=1.0, top_k=0, top_p=1.0)
    found = torch.bincount(tokens, minlength=7) / count
    torch.testing.assert_close(found, logits[0].softmax(0), atol=1.5 / count, rtol=0)


def test_greedy_takes_the_largest_logit() -> None:
    logits = torch.tensor([[0.1, 3.0, 2.0], [5.0, -1.0, 4.9]])
    tokens, log_probs = choose_tokens(logits, torch.rand(2), temperature=0.0, top_k=0, top_p=1.0)
    assert tokens.tolist() == [1, 0]
    assert log_probs.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_ends_of_the_unit_interval_choose_possible_tokens(uniform: float) -> None:
    """Tokens of probability 0 stand at both ends of the vocabulary."""
    logits = torch.tensor([[-INF, 1.0, 2.0, -INF]])
    tokens, log_probs = choose_tokens(logits, torch.tensor([uniform]), temperature=1.0, top_k=0, top_p=1.0)
    assert int(tokens) == (1 if uniform == 0 else 2)
    assert torch.isfinite(log_probs).all()


def test_top_k_keeps_ties_and_off_keeps_all() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    assert torch.isfinite(keep_top_k(logits, 1)).tolist() == [[False, True, True, False]]
    assert keep_top_k(logits, 0) is logits
    assert torch.equal(keep_top_k(logits, 9), logits)


def test_top_p_keeps_the_token_that_reaches_the_mass() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert torch.isfinite(keep_top_p(logits, 0.49)).tolist() == [[True, False, False]]
    assert torch.isfinite(keep_top_p(logits, 0.51)).tolist() == [[True, True, False]]
    assert torch.isfinite(keep_top_p(logits, 1e-9)).tolist() == [[True, False, False]]


def test_repetition_penalty_touches_each_present_token_once() -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(5, 9, generator=generator)
    tokens = torch.randint(0, 9, (5, 12), generator=generator)
    present = torch.rand(5, 12, generator=generator) < 0.4
    present[0] = False
    found = penalize_repetition(logits, tokens, present, 1.3)
    for row in range(5):
        so_far = [int(t) for t, real in zip(tokens[row], present[row], strict=True) if real]
        torch.testing.assert_close(
            found[row].double(), torch.tensor(penalize(logits[row].tolist(), so_far, 1.3)).double()
        )
    assert torch.equal(found[0], logits[0]), "padding was penalised"
