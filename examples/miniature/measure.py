"""The numbers of one finished cell, from its replies to held-out prompts, its metrics and its samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import correlation, fmean

import numpy as np
from agreement import adjusted_mutual_information, roc_auc

from megatron_gil.demo.annotators import EASY
from megatron_gil.demo.domains import HELDOUT_DOMAIN, TRAINING_DOMAINS, read_task
from megatron_gil.demo.gold import count_flattery, gold_score
from megatron_gil.evaluation.report.runs import Json, Run, read_run
from megatron_gil.evaluation.statistics import skewness
from megatron_gil.jsonl import iter_jsonl

HARD = tuple(domain for domain in TRAINING_DOMAINS if domain not in EASY)
LAST = 10
"""Iterations (or events of samples: half as many) that "at the end" speaks of."""


def measure(run_dir: Path, replies: Path) -> dict[str, float]:
    """metric -> value; a metric that the cell does not have is left out."""
    numbers: dict[str, float] = {}
    if replies.exists():
        numbers |= of_replies([row for _, row in iter_jsonl(replies)])
    if not run_dir.exists():
        return numbers
    run = read_run(run_dir)
    if run.samples and "group_probs" in run.samples[0]:
        numbers |= of_samples(run.samples) | of_groups(run)
    return numbers | _of_training(run)


def of_replies(rows: Sequence[Json]) -> dict[str, float]:
    """Gold and proxy score of the final policy, on prompts that it was not trained on."""
    by_domain: dict[str, list[Json]] = defaultdict(list)
    for row in rows:
        by_domain[row["group"]].append(row)
    gold = {domain: fmean(gold_score(r["prompt"], r["response"]) for r in part) for domain, part in by_domain.items()}
    known = [row for row in rows if row["group"] != HELDOUT_DOMAIN]
    proxy = [row["score"] for row in known]
    return {
        "gold": fmean(gold[d] for d in TRAINING_DOMAINS),
        **{f"gold_{domain}": gold[domain] for domain in (*TRAINING_DOMAINS, HELDOUT_DOMAIN)},
        "gold_worst": min(gold[d] for d in TRAINING_DOMAINS),
        "gold_gap": gap(gold),
        "proxy": fmean(proxy),
        **{f"proxy_{d}": fmean(r["score"] for r in by_domain[d]) for d in TRAINING_DOMAINS},
        "proxy_skewness": skewness(proxy),
        "proxy_tail_mass": tail_mass(proxy),
        "easy_skewness": skewness([row["score"] for row in known if row["group"] in EASY]),
        "hard_skewness": skewness([row["score"] for row in known if row["group"] in HARD]),
        **{f"proxy_gold_{d}": _agreement(by_domain[d]) for d in TRAINING_DOMAINS},
        "distinct_replies": _distinct(known),
        "distinct_easy": _distinct([row for row in known if row["group"] in EASY]),
        "distinct_hard": _distinct([row for row in known if row["group"] in HARD]),
        "flattery": fmean(count_flattery(row["response"]) for row in known),
        "words": fmean(len(row["response"].split()) for row in known),
    }


def tail_mass(values: Sequence[float], num_std: float = 2.0) -> float:
    """Share of the values further than `num_std` standard deviations from their mean (a normal distribution: 0.0455
    for 2)."""
    centred = np.abs(np.asarray(values, dtype=np.float64) - np.mean(values))
    return float(np.mean(centred > num_std * np.std(values)))


def _agreement(rows: Sequence[Json]) -> float:
    """Correlation of proxy and gold score; 0 where one of them does not vary."""
    proxy, gold = [row["score"] for row in rows], [gold_score(row["prompt"], row["response"]) for row in rows]
    return correlation(proxy, gold) if len(set(proxy)) > 1 < len(set(gold)) else 0.0


def _distinct(rows: Sequence[Json]) -> float:
    """Share of different replies; canned ones lower it."""
    return len({row["response"] for row in rows}) / len(rows)


def of_samples(samples: Sequence[Json]) -> dict[str, float]:
    """Gold score during training, and how far the inferred groups at its end agree with the domains."""
    curve = gold_curve(samples)
    smooth = [fmean(curve[max(0, i - 2) : i + 1]) for i in range(len(curve))]
    numbers = {"train_gold_peak": max(smooth), "train_gold_drop": max(smooth) - smooth[-1]}
    last = sorted({row["iteration"] for row in samples})[-LAST // 2 :]
    rows = [row for row in samples if row["iteration"] in last]
    domains = [read_task(row["prompt"]).domain for row in rows]
    probs = [row["group_probs"] for row in rows]
    if len(probs[0]) == 1:
        return numbers
    groups = [p.index(max(p)) for p in probs]
    easy = [domain in EASY for domain in domains]
    first = [p[0] for p in probs]
    return numbers | {
        "ami_domains": adjusted_mutual_information(groups, domains),
        "ami_easy_hard": adjusted_mutual_information(groups, easy),
        "auc_easy": max(roc_auc(first, easy), 1 - roc_auc(first, easy)),
        "auc_high_score": _auc_of_score(rows, first),
    }


def gold_curve(samples: Sequence[Json]) -> list[float]:
    """Mean gold score of the replies of each iteration that kept samples."""
    by_iteration: dict[int, list[float]] = defaultdict(list)
    for row in samples:
        by_iteration[row["iteration"]].append(gold_score(row["prompt"], row["response"]))
    return [fmean(by_iteration[i]) for i in sorted(by_iteration)]


def _auc_of_score(rows: Sequence[Json], first: Sequence[float]) -> float:
    """AUC of p(group 0) for "scores above the median": what a split by score alone would give is 1."""
    scores = [row["score"] for row in rows]
    median = sorted(scores)[len(scores) // 2]
    auc = roc_auc(first, [score > median for score in scores])
    return max(auc, 1 - auc)


def of_groups(run: Run) -> dict[str, float]:
    """KL, stability and the gap between domains over training; of runs with groups their masses and weights."""
    numbers = {
        "kl": _end(run, "policy/kl_sequence"),
        "entropy": _end(run, "policy/entropy"),
        "score_gap_start": _score_gap(run, slice(0, LAST)),
        "score_gap_end": _score_gap(run, slice(-LAST, None)),
        "gradient_norm_max": max(run.series("policy/gradient_norm")[1]),
    }
    if "group/mass_1" not in run.names():
        return numbers
    steered = [row for row in run.metrics if row["iteration"] >= 40]  # warm-up and ramp are over
    masses = [name for name in run.names() if name.startswith("group/mass_")]
    high = [int(row["group/high"]) for row in steered]
    return numbers | {
        "return_gap_start": _return_gap(steered[:LAST]),
        "return_gap_end": _return_gap(steered[-LAST:]),
        "mass_least": fmean(min(row[name] for name in masses) for row in steered),
        "mass_high": fmean(row[f"group/mass_{h}"] for row, h in zip(steered, high, strict=True)),
        "skipped_by_mass": fmean(row["group/return_variance"] == 0 for row in steered),
        "weight_std": fmean(row["group/weight_std"] for row in steered),
        "negative_weights": fmean(row["group/negative_weights"] for row in steered),
        "flips": sum(row["group/flipped"] for row in run.metrics),
        "kl_weight": fmean(row["policy/kl_weight"] for row in steered),
        "kl_high": fmean(row[f"policy/kl_group_{h}"] for row, h in zip(steered[-LAST:], high[-LAST:], strict=True)),
        "kl_low": fmean(_kl_elsewhere(row) for row in steered[-LAST:]),
    }


def _kl_elsewhere(row: Mapping[str, float]) -> float:
    """KL a reply of the groups that are not high, by mass."""
    low = [g for g in range(9) if f"group/mass_{g}" in row and g != int(row["group/high"])]
    mass = sum(row[f"group/mass_{g}"] for g in low)
    total = sum(row[f"group/mass_{g}"] * (row[f"policy/kl_group_{g}"] or 0.0) for g in low)
    return total / mass if mass else 0.0


def _return_gap(rows: Sequence[Json]) -> float:
    """Mean over iterations of the largest less the least return of a group that counts (2 % of the rows)."""
    gaps: list[float] = []
    for row in rows:
        counts = [g for g in range(9) if row.get(f"group/mass_{g}", 0.0) >= 0.02]
        returns = [row[f"group/return_{g}"] for g in counts]
        gaps.append(max(returns) - min(returns))
    return fmean(gaps)


def _of_training(run: Run) -> dict[str, float]:
    """Numbers that a run writes at its end, of evaluation data."""
    last = run.metrics[-1]
    return {name.replace("/", "_"): value for name, value in last.items() if name.startswith("eval/")}


def _score_gap(run: Run, where: slice) -> float:
    """Mean score of the easy domains less that of the hard ones, over some iterations of training."""
    found = [gap_of_scores(row) for row in run.metrics[where]]
    return fmean(value for value in found if value is not None)


def gap_of_scores(row: Mapping[str, float]) -> float | None:
    """Mean score of the easy domains less that of the hard ones in an iteration; None where it lacks one of them."""
    scores = {name: row.get(f"reward/score_mean_known_{name}") for name in (*TRAINING_DOMAINS, "easy", "hard")}
    if scores["easy"] is not None and scores["hard"] is not None:
        return scores["easy"] - scores["hard"]
    by_domain = {name: score for name, score in scores.items() if score is not None}
    return gap(by_domain) if set(by_domain) == set(TRAINING_DOMAINS) else None


def gap(by_domain: Mapping[str, float]) -> float:
    """Mean over the easy domains less the mean over the hard ones."""
    return fmean(by_domain[d] for d in EASY) - fmean(by_domain[d] for d in HARD)


def _end(run: Run, metric: str) -> float:
    return fmean(run.series(metric)[1][-LAST:])
