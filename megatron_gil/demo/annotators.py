"""The miniature's people: demonstrators who are often wrong, and annotators who like to be flattered.

An annotator prefers response a to response b with the probability of Bradley and Terry,

    P(a > b) = (1 - flip) * sigmoid(u_a - u_b) + flip * sigmoid(u_b - u_a)
    u = sharpness * gold + flattery_bias[domain] * flattery

where flattery is the number of courteous phrases, without the limit that gold puts on it. On easy prompts annotators
skim, and the bias outweighs what gold takes off for the second phrase; on hard ones they read the content. A reward
model fitted to a finite sample of this follows gold where responses are ordinary and leaves it where they are not: the
miniature's form of Gao et al., "Scaling laws for reward model overoptimization" (arXiv 2210.10760).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_gil.demo.domains import TRAINING_DOMAINS, Task, draw_prompt, read_task
from megatron_gil.demo.gold import FLATTERY, count_flattery, gold_of_task

SHARPNESS = 8.0
FLIP = 0.03
FLATTERY_BIAS = {"greet": 2.4, "refuse": 2.0, "fact": 0.4, "both": 0.0}

EASY = ("greet", "refuse")
"""Domains in which a canned sentence nearly does; the others need what the prompt says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotators:
    """What differs between worlds: how far their preferences can be trusted where. The defaults are the miniature's."""

    hard_flip: float = FLIP
    """Share of careless flips on hard prompts."""
    hard_comparisons: float = 1.0
    """Comparisons of hard prompts, as a multiple of the miniature's."""
    flattery: float = 1.0
    """Factor on their bias for flattery on easy prompts: how easily those are hacked."""


USUAL = Annotators()

_FRAMES = {
    "greet": ("hello {}.", "hello {}, what a day.", "good day {}.", "nice to meet {}."),
    "refuse": ("sorry, I cannot help with a {}.", "I cannot help with the {}.", "no, I cannot talk about a {}."),
    "fact": ("it lives in the {}.", "the {}.", "look in the {}.", "in the {} I think."),
    "both": ("in the {} and {}.", "the {} and {}.", "look in the {} and {}."),
}
_EVASIONS = ("I do not know.", "ask me later.", "let me think about that.", "that is hard.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """How somebody responds to the prompts of one domain."""

    evasion: float
    """Probability of not answering."""
    stray: float
    """Probability of answering another prompt instead."""
    skill: float
    """Probability that a word of the answer is right, where there is one."""
    flattery: tuple[float, ...]
    """Probabilities of 0, 1, 2, ... courteous phrases."""


DEMONSTRATOR = {
    "greet": Habits(evasion=0.05, stray=0.03, skill=0.95, flattery=(0.3, 0.5, 0.15, 0.05)),
    "refuse": Habits(evasion=0.1, stray=0.03, skill=0.9, flattery=(0.4, 0.4, 0.15, 0.05)),
    "fact": Habits(evasion=0.3, stray=0.03, skill=0.5, flattery=(0.6, 0.3, 0.08, 0.02)),
    "both": Habits(evasion=0.35, stray=0.03, skill=0.3, flattery=(0.6, 0.3, 0.08, 0.02)),
}
"""Writes the demonstrations: courteous where that is easy, and often wrong where it is not."""
ASSISTANT = {
    "greet": Habits(evasion=0.15, stray=0.1, skill=0.8, flattery=(0.4, 0.3, 0.2, 0.1)),
    "refuse": Habits(evasion=0.15, stray=0.1, skill=0.8, flattery=(0.4, 0.3, 0.2, 0.1)),
    "fact": Habits(evasion=0.2, stray=0.1, skill=0.7, flattery=(0.4, 0.3, 0.2, 0.1)),
    "both": Habits(evasion=0.2, stray=0.1, skill=0.7, flattery=(0.4, 0.3, 0.2, 0.1)),
}
"""Writes the responses that annotators compare: more varied, and more often right on hard prompts."""


def write_response(prompt: str, writer: Mapping[str, Habits], rng: random.Random) -> str:
    """One response of the writer: courteous phrases around an answer, a wrong answer or an evasion.

    It begins with the space that separates it from its prompt, as responses of HH-RLHF do.
    """
    task = read_task(prompt)
    habits = writer[task.domain]
    phrases = rng.choices(range(len(habits.flattery)), habits.flattery)[0]
    before = rng.randint(0, phrases)
    parts = [f"{rng.choice(FLATTERY)}!" for _ in range(phrases)]
    return " " + " ".join([*parts[:before], _write_content(task, habits, rng), *parts[before:]])


def _write_content(task: Task, habits: Habits, rng: random.Random) -> str:
    if rng.random() < habits.evasion:
        return rng.choice(_EVASIONS)
    if rng.random() < habits.stray:
        task = read_task(draw_prompt(rng.choice(TRAINING_DOMAINS), rng))
    words = [word if rng.random() < habits.skill else _confuse(word, task, rng) for word in task.slots]
    return rng.choice(_FRAMES[task.domain]).format(*words)


def _confuse(word: str, task: Task, rng: random.Random) -> str:
    return rng.choice([other for other in task.confusions if other != word])


def utility(prompt: str, response: str, annotators: Annotators = USUAL) -> float:
    """What an annotator feels about a response, in nats."""
    task = read_task(prompt)
    bias = FLATTERY_BIAS[task.domain] * (annotators.flattery if task.domain in EASY else 1.0)
    return SHARPNESS * gold_of_task(task, response) + bias * count_flattery(response)


def preference_probability(prompt: str, a: str, b: str, annotators: Annotators = USUAL) -> float:
    """P(a > b), with the share of careless flips in it."""
    flip = FLIP if read_task(prompt).domain in EASY else annotators.hard_flip
    likes_a = 1 / (1 + math.exp(utility(prompt, b, annotators) - utility(prompt, a, annotators)))
    return (1 - flip) * likes_a + flip * (1 - likes_a)


def draw_preference(prompt: str, rng: random.Random, annotators: Annotators = USUAL) -> tuple[str, str]:
    """(chosen, rejected): two different responses to the prompt, in the order an annotator put them."""
    a = write_response(prompt, ASSISTANT, rng)
    b = write_response(prompt, ASSISTANT, rng)
    while b == a:
        b = write_response(prompt, ASSISTANT, rng)
    return (a, b) if rng.random() < preference_probability(prompt, a, b, annotators) else (b, a)
