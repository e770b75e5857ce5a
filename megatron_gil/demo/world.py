"""Writes the miniature's world: the data files that a 7B run would bring along, and a tiny Llama to train on them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_gil.config import ConfigError
from megatron_gil.demo.annotators import DEMONSTRATOR, EASY, USUAL, Annotators, draw_preference, write_response
from megatron_gil.demo.domains import HELDOUT_DOMAIN, TRAINING_DOMAINS, draw_prompt, read_task
from megatron_gil.demo.tiny_llama import write_tiny_llama

Row = dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldSizes:
    """Rows of each file. Training domains take equal shares."""

    demonstrations: int = 8000
    preferences: int = 12000
    prompts: int = 4000
    eval_prompts: int = 256
    heldout_prompts: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Where everything is."""

    demonstrations: Path
    preferences: Path
    preferences_eval: Path
    prompts: Path
    prompts_eval: Path
    prompts_heldout: Path
    model: Path


def write_world(
    directory: Path, *, seed: int, sizes: WorldSizes | None = None, annotators: Annotators = USUAL
) -> World:
    """The world of a seed, the same bytes each time, in a directory that does not exist yet.

    Prompts of prompts_eval occur in no training file; the held-out domain in prompts_heldout alone.
    """
    if directory.exists() and any(directory.iterdir()):
        raise ConfigError(f"{directory} exists and is not empty; name another directory for the miniature's world")
    sizes = sizes or WorldSizes()
    world = world_at(directory)
    world.model.mkdir(parents=True)
    rng = random.Random(seed)
    eval_prompts = _draw_distinct(TRAINING_DOMAINS, sizes.eval_prompts, rng)
    heldout = _draw_distinct((HELDOUT_DOMAIN,), sizes.heldout_prompts, rng)
    unseen = frozenset(eval_prompts)
    demonstrations = [
        {"prompt": prompt, "completion": write_response(prompt, DEMONSTRATOR, rng)}
        for prompt in _draw_prompts(sizes.demonstrations, rng, unseen)
    ]
    preferences = [_preference_row(prompt, rng, annotators) for prompt in _draw_prompts(sizes.preferences, rng, unseen)]
    if annotators.hard_comparisons != 1.0:  # drawn apart, so that all other files stay as they are
        apart = random.Random(f"{seed} comparisons of hard prompts")
        preferences = _with_hard(preferences, annotators, apart, unseen)
    _write_rows(world.demonstrations, demonstrations)
    _write_rows(world.preferences, preferences)
    _write_rows(world.preferences_eval, (_preference_row(prompt, rng, annotators) for prompt in eval_prompts))
    _write_rows(world.prompts, ({"prompt": p} for p in _draw_prompts(sizes.prompts, rng, unseen)))
    _write_rows(world.prompts_eval, ({"prompt": p} for p in eval_prompts))
    _write_rows(world.prompts_heldout, ({"prompt": p} for p in heldout))
    texts = [f"{row['prompt']}{row['completion']}" for row in demonstrations]
    write_tiny_llama(world.model, texts, seed=seed)
    return world


def world_at(directory: Path) -> World:
    """Where the files of a world are."""
    return World(
        demonstrations=directory / "demonstrations.jsonl",
        preferences=directory / "preferences.jsonl",
        preferences_eval=directory / "preferences_eval.jsonl",
        prompts=directory / "prompts.jsonl",
        prompts_eval=directory / "prompts_eval.jsonl",
        prompts_heldout=directory / "prompts_heldout.jsonl",
        model=directory / "tiny-llama",
    )


def _draw_prompts(count: int, rng: random.Random, unseen: frozenset[str]) -> list[str]:
    """Prompts of all training domains in turn, none of them in `unseen`."""
    prompts: list[str] = []
    while len(prompts) < count:
        prompt = draw_prompt(TRAINING_DOMAINS[len(prompts) % len(TRAINING_DOMAINS)], rng)
        if prompt not in unseen:
            prompts.append(prompt)
    return prompts


def _draw_distinct(domains: tuple[str, ...], count: int, rng: random.Random) -> list[str]:
    """Distinct prompts, the domains in turn."""
    prompts: dict[str, None] = {}
    for _ in range(100 * count):
        if len(prompts) == count:
            return list(prompts)
        prompts.setdefault(draw_prompt(domains[len(prompts) % len(domains)], rng))
    raise ConfigError(
        f"the miniature has no {count} distinct prompts of {', '.join(domains)}; ask for fewer to evaluate"
    )


def _preference_row(prompt: str, rng: random.Random, annotators: Annotators) -> Row:
    chosen, rejected = draw_preference(prompt, rng, annotators)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _with_hard(rows: list[Row], annotators: Annotators, rng: random.Random, unseen: frozenset[str]) -> list[Row]:
    """With more comparisons of hard prompts, or fewer; those of easy ones stay."""
    easy = [row for row in rows if read_task(row["prompt"]).domain in EASY]
    hard = [row for row in rows if read_task(row["prompt"]).domain not in EASY]
    wanted = round(annotators.hard_comparisons * len(hard))
    while len(hard) < wanted:
        prompts = _draw_prompts(len(rows), rng, unseen)
        more = [prompt for prompt in prompts if read_task(prompt).domain not in EASY]
        hard += [_preference_row(prompt, rng, annotators) for prompt in more[: wanted - len(hard)]]
    found = [*easy, *hard[:wanted]]
    rng.shuffle(found)
    return found


def _write_rows(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({**row, "group": read_task(row["prompt"]).domain}) + "\n")
