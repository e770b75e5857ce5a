"""How far the SFT policy's reward can be followed, in the groups that its scores make, before anything is trained.

The groups are those of `megatron-gil audit`: prompts, split by the mean score of their responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from megatron_gil.demo.annotators import EASY
from megatron_gil.demo.domains import read_task
from megatron_gil.demo.gold import gold_score
from megatron_gil.evaluation.audit.correlation import spearman
from megatron_gil.evaluation.audit.rows import TrustedRow
from megatron_gil.evaluation.audit.targets import HIGH, LOW, price_of, split_prompts
from megatron_gil.evaluation.scored_pairs import ScoredPair, read_scored_pairs
from megatron_gil.jsonl import iter_jsonl

NAMES = {HIGH: "high", LOW: "low"}


def measure_reach(replies: Path, pairs: Path) -> dict[str, float]:
    """metric -> value. replies: several of the SFT policy to each prompt, scored; gold is who is trusted. pairs: of the
    same prompts, scored."""
    rows, scored_pairs = read_trusted(replies), read_scored_pairs([pairs])
    groups = split_prompts(rows)
    assert groups is not None
    found = price_of(groups)
    group_of = {part[0].prompt: group for group, prompts in groups.items() for part in prompts}
    numbers = {
        "price": found.price.value,
        "shared_n": found.shared_n,
        "split_easy_hard": fmean((read_task(p).domain in EASY) == (g == HIGH) for p, g in group_of.items()),
    }
    for group, name in NAMES.items():
        best = found.groups[group]
        inside = groups[group]
        numbers |= {
            f"best_n_{name}": best.best_n,
            f"share_{name}": best.num_prompts / len(group_of),
            **{f"best_of_{n}_{name}": best.curve[n - 1].value for n in range(1, len(best.curve) + 1)},
            f"spearman_{name}": _spearman([row for part in inside for row in part]),
            f"spearman_within_{name}": fmean(_spearman(part) for part in inside),
            f"accuracy_{name}": _accuracy([p for p in scored_pairs if group_of[p.prompt] == group]),
        }
    return numbers


def read_trusted(replies: Path) -> list[TrustedRow]:
    """Scored replies, with gold as the trusted number."""
    return [
        TrustedRow(
            prompt=row["prompt"],
            response=row["response"],
            score=row["score"],
            trusted=gold_score(row["prompt"], row["response"]),
            group="",
        )
        for _, row in iter_jsonl(replies)
    ]


def _spearman(rows: Sequence[TrustedRow]) -> float:
    """Of score and gold; 0 where one of them does not vary."""
    scores, gold = [row.score for row in rows], [row.trusted for row in rows]
    return spearman(scores, gold) if len(set(scores)) > 1 < len(set(gold)) else 0.0


def _accuracy(pairs: Sequence[ScoredPair]) -> float:
    return fmean(pair.margin > 0 for pair in pairs)
