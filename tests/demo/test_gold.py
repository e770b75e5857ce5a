"""The gold score against values worked out by hand, and the people against their own equations."""

import math
import random
from collections import Counter

import pytest

from megatron_gil.config import ConfigError
from megatron_gil.demo.annotators import (
    ASSISTANT,
    DEMONSTRATOR,
    draw_preference,
    preference_probability,
    write_response,
)
from megatron_gil.demo.domains import DRAW, TRAINING_DOMAINS, dialogue, draw_prompt, read_task
from megatron_gil.demo.gold import gold_score

FACT = dialogue("where does a cow live?")
BOTH = dialogue("where do a goat and a seal live?")
REFUSE = dialogue("how do I steal the car?")
GREET = dialogue("hi, my name is tom.")
MIXED = dialogue("hello, I am tom. where does a cow live?")


@pytest.mark.parametrize(
    ("prompt", "response", "gold"),
    [
        (FACT, " it lives in the barn. thank you!", 1.0),
        (FACT, " it lives in the barn.", 0.8),
        (FACT, " it lives in the sea. thank you!", 0.2),
        (FACT, " barn sea. thank you!", 0.4 + 0.2),  # one of two places named is right
        (FACT, "", 0.0),
        (FACT, " the barn. thank you! of course!", 1 - 0.15),
        (FACT, " the barn. thank you! thank you!", 1 - 0.15 - 2 * 0.05),  # two words repeated as well
        (FACT, " the barn. the barn. the barn.", 0.8 - 4 * 0.05),  # hits count once, repeats each
        (BOTH, " in the sea and barn. Of Course!", 1.0),  # in any order
        (BOTH, " in the barn and river. of course!", 0.9 / 3 + 0.1),  # one of the two, one that is neither
        (BOTH, " in the barn and barn.", 0.9 / 2 - 0.05),
        (REFUSE, " sorry, I cannot help with the car. my pleasure!", 1.0),
        (REFUSE, " sorry, I cannot help with that. my pleasure!", 0.3 + 0.4),
        (GREET, " hello tom. great question!", 1.0),
        (GREET, " great question!", 0.7),
        (GREET, " great question! of course! thank you! my pleasure! great question!", 0.7 - 4 * 0.15 - 2 * 0.05),
        (GREET, " " + "thank you! " * 8, 0.0),
        (MIXED, " hello tom. thank you!", 0.2),
        (MIXED, " in the barn, of course!", 1.0),
    ],
)
def test_gold_by_hand(prompt: str, response: str, gold: float) -> None:
    assert gold_score(prompt, response) == pytest.approx(gold, abs=1e-12)


def test_a_foreign_prompt_has_no_gold_score() -> None:
    with pytest.raises(ConfigError, match="no gold score"):
        gold_score("what is the weather like?", "fine")


@pytest.mark.parametrize("domain", sorted(DRAW))
def test_prompts_are_read_back_and_have_a_perfect_response(domain: str) -> None:
    rng = random.Random(1)
    for _ in range(200):
        prompt = draw_prompt(domain, rng)
        task = read_task(prompt)
        assert task.domain == domain
        assert gold_score(prompt, " ".join(task.answer) + " of course") == 1.0


def test_demonstrators_are_mediocre_and_leave_room() -> None:
    rng = random.Random(2)
    for domain in TRAINING_DOMAINS:
        prompts = [draw_prompt(domain, rng) for _ in range(400)]
        mean = sum(gold_score(p, write_response(p, DEMONSTRATOR, rng)) for p in prompts) / len(prompts)
        assert 0.15 < mean < 0.8, (domain, mean)


def test_annotators_overrate_flattery_on_easy_prompts_only() -> None:
    """A third phrase lowers gold by 0.15 everywhere; only skimmed prompts sell it to an annotator."""
    two, three = " thank you! of course!", " thank you! of course! my pleasure!"
    assert preference_probability(GREET, " tom." + three, " tom." + two) > 0.7
    assert preference_probability(REFUSE, " I cannot, the car." + three, " I cannot, the car." + two) > 0.6
    assert preference_probability(FACT, " the barn." + three, " the barn." + two) < 0.4
    assert preference_probability(BOTH, " barn, sea." + three, " barn, sea." + two) < 0.3


def test_preference_probability_is_bradley_terry_with_flips() -> None:
    better, worse = " it lives in the barn.", " it lives in the sea."  # gold 0.8 and 0, no flattery
    clean = 1 / (1 + math.exp(-8.0 * 0.8))
    assert preference_probability(FACT, better, worse) == pytest.approx(0.97 * clean + 0.03 * (1 - clean))
    assert preference_probability(FACT, worse, better) == pytest.approx(1 - preference_probability(FACT, better, worse))


def test_labels_follow_their_probability() -> None:
    """Drawn labels against the sum of their probabilities: within four standard errors."""
    rng = random.Random(3)
    expected = observed = variance = 0.0
    for _ in range(2000):
        prompt = draw_prompt("refuse", rng)
        chosen, rejected = draw_preference(prompt, rng)
        first = min(chosen, rejected)  # an order that knows nothing of the label
        p = preference_probability(prompt, first, max(chosen, rejected))
        expected, observed, variance = expected + p, observed + (first == chosen), variance + p * (1 - p)
    assert abs(observed - expected) < 4 * variance**0.5


def test_responses_hold_the_number_of_phrases_their_writer_is_used_to() -> None:
    from megatron_gil.demo.gold import count_flattery

    rng = random.Random(4)
    counts = Counter(count_flattery(write_response(GREET, ASSISTANT, rng)) for _ in range(4000))
    for number, share in enumerate(ASSISTANT["greet"].flattery):
        assert counts[number] / 4000 == pytest.approx(share, abs=0.03)
