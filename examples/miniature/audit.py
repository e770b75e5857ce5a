"""What the group classifiers found: who is in each group, and whether another seed finds the same."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import fmean

from agreement import adjusted_rand_index
from tables import OURS

from megatron_gil.demo.domains import TRAINING_DOMAINS, read_task
from megatron_gil.demo.gold import count_flattery, gold_score
from megatron_gil.evaluation.audit.words import typical_words
from megatron_gil.evaluation.report.page import Table
from megatron_gil.evaluation.report.runs import Json, Run

GROUPED = (OURS, "gil_plain_kl", "gil_own_model", "gil_score_groups", "gil_floor", "beta_0", "beta_1")
GROUPED += ("gil_m3", "grpo_gil")
EVENTS = 5
"""The last iterations that kept samples."""


def stability_table(runs: Mapping[tuple[str, int], Run], labels: Mapping[str, str]) -> Table:
    """Per method: agreement of two seeds' classifiers about the prompts that both happened to sample at the end."""
    cells: list[tuple[str, ...]] = []
    for method in GROUPED:
        by_seed = [groups_of_prompts(run.last_samples(EVENTS)) for (name, _), run in runs.items() if name == method]
        found = [(index, count) for a, b in combinations(by_seed, 2) for index, count in [agreement(a, b)] if count > 1]
        if found:
            indices = [index for index, _ in found]
            spread = f"{fmean(indices):.2f} ({min(indices):.2f} to {max(indices):.2f})"
            cells.append((labels[method], str(len(found)), f"{fmean(count for _, count in found):.0f}", spread))
    header = ("method", "pairs of seeds", "shared prompts", "ARI, mean (range)")
    note = "Adjusted Rand index of the likelier group of each prompt; worlds, models and classifiers differ by seed."
    return Table(caption="Stability of the groups over seeds", header=header, rows=cells, note=note)


def groups_of_prompts(rows: Sequence[Json]) -> dict[str, int]:
    """Prompt -> the group with the highest mean probability over its replies."""
    probs: dict[str, list[Sequence[float]]] = defaultdict(list)
    for row in rows:
        probs[row["prompt"]].append(row["group_probs"])
    sums = {prompt: [sum(column) for column in zip(*found, strict=True)] for prompt, found in probs.items()}
    return {prompt: total.index(max(total)) for prompt, total in sums.items()}


def agreement(a: Mapping[str, int], b: Mapping[str, int]) -> tuple[float, int]:
    """(adjusted Rand index over the prompts in both, their number)."""
    shared = sorted(set(a) & set(b))
    return adjusted_rand_index([a[p] for p in shared], [b[p] for p in shared]), len(shared)


def audit_table(runs: Mapping[tuple[str, int], Run]) -> Table:
    """What PPO-GIL's classifier found: replies of the last five iterations that kept samples, by likelier group."""
    cells: list[tuple[str, ...]] = []
    for (method, seed), run in runs.items():
        if method != OURS:
            continue
        rows = run.last_samples(EVENTS)
        for group in range(len(rows[0]["group_probs"])):
            part = [row for row in rows if row["group_probs"].index(max(row["group_probs"])) == group]
            if part:
                cells.append((str(seed), str(group), *_audit(part, rows), "; ".join(_surest(part, group))))
    header = ("seed", "group", "replies", "score", "gold", "words", "phrases", "domains", "typical words", "prompts")
    note = "Typical: the words whose share of the group's words exceeds their share of all words the most. "
    note += "Prompts: two of those that the classifier is surest of."
    return Table(caption="Group audit of PPO-GIL", header=header, rows=cells, note=note)


def _audit(part: Sequence[Json], rows: Sequence[Json]) -> tuple[str, ...]:
    domains = Counter(read_task(row["prompt"]).domain for row in part)
    return (
        str(len(part)),
        f"{fmean(row['score'] for row in part):.2f}",
        f"{fmean(gold_score(row['prompt'], row['response']) for row in part):.2f}",
        f"{fmean(len(row['response'].split()) for row in part):.1f}",
        f"{fmean(count_flattery(row['response']) for row in part):.2f}",
        ", ".join(f"{d} {100 * domains[d] / len(part):.0f} %" for d in TRAINING_DOMAINS),
        ", ".join(_typical(part, rows)),
    )


def _surest(part: Sequence[Json], group: int, count: int = 2) -> list[str]:
    prompts = dict.fromkeys(row["prompt"] for row in sorted(part, key=lambda row: -row["group_probs"][group]))
    return [_question(prompt) for prompt in list(prompts)[:count]]


def _question(prompt: str) -> str:
    """What the human said, on one line."""
    return " ".join(prompt.partition("Human:")[2].partition("Assistant:")[0].split()) or " ".join(prompt.split())


def _typical(part: Sequence[Json], rows: Sequence[Json], count: int = 5) -> list[str]:
    here, everywhere = ([row["response"] for row in some] for some in (part, rows))
    return [found.word for found in typical_words(here, everywhere, count)]
