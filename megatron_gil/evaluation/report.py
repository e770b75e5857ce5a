"""Run directories as one HTML page that needs nothing beside itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TypeVar

from megatron_gil.config import ConfigError
from megatron_gil.evaluation.figures import FrontierPoint, Series, curve_grid, frontier, score_distributions, to_svg
from megatron_gil.evaluation.judge import ScoreJudge, recorded_scores
from megatron_gil.evaluation.page import Picture, Section, Table, page, paragraph, picture, samples_table, table
from megatron_gil.evaluation.runs import Json, Run, config_differences, read_runs
from megatron_gil.evaluation.winrate import HEADER, table_rows, verdicts, win_rate
from megatron_gil.paths import write_whole

T = TypeVar("T")

CURVES: Mapping[str, str] = {
    "reward/score_mean": "reward-model score",
    "reward/return_mean": "return (score - KL penalty)",
    "reward/score_std": "standard deviation of the score",
    "policy/kl_sequence": "KL from the reference, nats a reply",
    "policy/kl": "KL from the reference, nats a token",
    "policy/entropy": "entropy, nats a token",
    "response/tokens": "reply length, tokens",
    "policy/clip_fraction": "share of clipped policy ratios",
    "critic/value_loss": "value loss",
    "critic/explained_variance": "explained variance of the returns",
    "group/return_variance": "variance of returns between groups",
    "sft/loss": "SFT loss, nats a token",
    "reward/loss": "reward-model loss, nats a pair",
    "reward/accuracy": "reward-model accuracy",
    "dpo/loss": "DPO loss, nats a pair",
    "dpo/accuracy": "DPO accuracy",
    "dpo/margin": "DPO margin",
    "time/tokens_per_s": "tokens a second",
}
"""Metrics drawn with all runs in one panel, and what they are called; the rest is in metrics.jsonl."""

OVERVIEW: Mapping[str, str] = {
    "reward/score_mean": "score",
    "reward/return_mean": "return",
    "policy/kl_sequence": "KL a reply",
    "policy/entropy": "entropy",
    "response/tokens": "tokens a reply",
    "group/return_variance": "group variance",
    "sft/loss": "loss",
    "reward/loss": "loss",
    "dpo/loss": "loss",
    "reward/accuracy": "accuracy",
    "dpo/accuracy": "accuracy",
    "time/tokens_per_s": "tokens/s",
}

GROUP_CURVES: Mapping[str, str] = {
    r"reward/score_mean_group_(\d+)": "score per inferred group",
    r"group/return_(\d+)": "return per inferred group",
    r"group/mass_(\d+)": "mass of the inferred group",
    r"policy/kl_group_(\d+)": "KL per inferred group",
}
"""Patterns of metrics, a panel for each and a line per inferred group."""

KNOWN_CURVES = r"reward/score_mean_known_(.+)"

SAMPLE_ROWS = 8
PANELS_OF_A_PICTURE = 6
"""What a printed page holds."""
LAST_EVENTS = 5
"""Of the iterations that kept samples, those that tell how a run ended."""
FRONTIER_POINTS = 12


def write_report(
    run_dirs: Sequence[Path],
    output: Path,
    *,
    title: str = "megatron-gil report",
    introduction: str = "",
    tables: Sequence[Table] = (),
    pictures: Sequence[Picture] = (),
) -> None:
    """Write `output`, an existing file included; `tables` and `pictures` come first, under "Results"."""
    runs = read_runs(run_dirs)
    sections = [
        Section(title="Results", body=[*map(table, tables), *map(picture, pictures)]),
        Section(title="Runs", body=[table(_overview(runs))]),
        Section(title="Training curves", body=_curves(runs)),
        Section(title="Groups", body=_group_curves(runs)),
        Section(title="Scores", body=[*_distributions(runs), *_frontier(runs), *_wins(runs)]),
        Section(title="Replies side by side", body=_samples(runs)),
        Section(title="Config differences", body=_differences(runs)),
        Section(title="Config changes during a run", body=_changes(runs)),
    ]
    text = page(title, introduction or f"{len(runs)} run{'s' * (len(runs) != 1)}.", sections)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, text)
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written: {error.strerror}; choose another --output") from None


def _overview(runs: Sequence[Run]) -> Table:
    shown = {name: label for name, label in OVERVIEW.items() if any(run.series(name)[1] for run in runs)}
    rows = [(run.name, str(len(run.metrics)), *(_last(run, name) for name in shown)) for run in runs]
    origins = dict.fromkeys(run.origin for run in runs if run.origin)
    return Table(
        caption="Mean over the last tenth of each run",
        header=("run", "iterations", *shown.values()),
        rows=rows,
        note=f"Written by {'; '.join(origins)}." if origins else "",
    )


def _last(run: Run, metric: str) -> str:
    values = run.series(metric)[1]
    tail = values[-max(1, len(values) // 10) :]
    return f"{sum(tail) / len(tail):.4g}" if tail else "-"


def _curves(runs: Sequence[Run]) -> list[str]:
    panels: dict[str, dict[str, Series]] = {}
    for metric, label in CURVES.items():
        lines = {run.name: run.series(metric) for run in runs}
        if any(y for _, y in lines.values()):
            panels[label] = {name: line for name, line in lines.items() if line[1]}
    pages = [dict(part) for part in _parts(list(panels.items()), PANELS_OF_A_PICTURE)]
    captions = [""] * (len(pages) - 1) + [
        "Faint: each iteration. Full: mean of the last twentieth of the run's length."
    ]
    return [
        picture(Picture(svg=to_svg(curve_grid(part)), caption=caption))
        for part, caption in zip(pages, captions, strict=False)
    ]


def _group_curves(runs: Sequence[Run]) -> list[str]:
    body: list[str] = []
    known = {run.name: lines for run in runs if (lines := _matching(run, KNOWN_CURVES))}
    if known:
        svg = to_svg(curve_grid(known, share_y=True))
        body.append(picture(Picture(svg=svg, caption="Score per label that came with the data, a panel per run.")))
    for run in runs:
        panels = {label: lines for pattern, label in GROUP_CURVES.items() if (lines := _matching(run, pattern))}
        if any(len(lines) > 1 for lines in panels.values()):  # plain PPO has one group, all of the batch
            svg = to_svg(curve_grid(panels, columns=4))
            body.append(picture(Picture(svg=svg, caption=f"{run.name}: the groups that its classifier inferred.")))
    return body


def _matching(run: Run, pattern: str) -> dict[str, Series]:
    found = ((re.fullmatch(pattern, name), name) for name in run.names())
    return {(f"group {m[1]}" if m[1].isdigit() else m[1]): run.series(name) for m, name in found if m}


def _distributions(runs: Sequence[Run]) -> list[str]:
    scores = {
        run.name: [s["score"] for s in run.last_samples(LAST_EVENTS) if s.get("score") is not None] for run in runs
    }
    scores = {name: found for name, found in scores.items() if found}
    if not scores:
        return []
    caption = f"Reward-model scores of the samples of the last {LAST_EVENTS} iterations that kept some; dashed: the "
    caption += "normal distribution of the same mean and spread."
    return [picture(Picture(svg=to_svg(score_distributions(scores)), caption=caption))]


def _frontier(runs: Sequence[Run]) -> list[str]:
    """Score against KL over training, each point the mean of an equal part of the run."""
    points = {run.name: found for run in runs if (found := _points(run))}
    if not points:
        return []
    caption = "Reward-model score against the distance from the reference model; the filled point is the end."
    return [picture(Picture(svg=to_svg(frontier(points)), caption=caption))]


def _points(run: Run) -> list[FrontierPoint]:
    found = ((row.get("policy/kl_sequence"), row.get("reward/score_mean")) for row in run.metrics)
    rows = [(kl, score) for kl, score in found if kl is not None and score is not None]
    parts = _parts(rows, max(1, len(rows) // FRONTIER_POINTS))
    return [FrontierPoint(kl=fmean(kl for kl, _ in part), proxy=fmean(score for _, score in part)) for part in parts]


def _parts(rows: list[T], size: int) -> list[list[T]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _wins(runs: Sequence[Run]) -> list[str]:
    """The first run against each other on prompts that both answered in the same iteration."""
    ours, rates = {(s["iteration"], s["prompt"]): s for s in runs[0].last_samples(LAST_EVENTS)}, {}
    for run in runs[1:]:
        theirs = {(s["iteration"], s["prompt"]): s for s in run.last_samples(LAST_EVENTS)}
        rows = [(ours[key], theirs[key]) for key in ours if key in theirs]
        rows = [(a, b) for a, b in rows if a.get("score") is not None and b.get("score") is not None]
        if rows:
            judge = ScoreJudge("score", recorded_scores((row for pair in rows for row in pair), "samples.jsonl"))
            rates[run.name] = win_rate(verdicts(judge, [a for a, _ in rows], [b for _, b in rows]))
    if not rates:
        return []
    note = "By the score in samples.jsonl, of each run's own reward model, which training drives up: compare with a "
    note += "judge that did not take part (megatron-gil evaluate)."
    caption = f"{runs[0].name} against the others on the same training prompts: win / tie / lose"
    return [table(Table(caption=caption, header=HEADER, rows=table_rows(rates), note=note))]


def _samples(runs: Sequence[Run]) -> list[str]:
    with_samples = [run for run in runs if run.samples]
    if not with_samples:
        return []
    latest = {
        run.name: [s for s in run.samples if s["iteration"] == run.samples[-1]["iteration"]] for run in with_samples
    }
    prompts = list(dict.fromkeys(sample["prompt"] for samples in latest.values() for sample in samples))
    # prompts that most runs answered come first: runs of one seed draw the same ones
    prompts.sort(key=lambda p: -sum(any(s["prompt"] == p for s in samples) for samples in latest.values()))
    rows = [
        (prompt, [[_shown(s) for s in latest[run.name] if s["prompt"] == prompt] for run in with_samples])
        for prompt in prompts[:SAMPLE_ROWS]
    ]
    note = "Of the last iteration written to each run's samples.jsonl. A score is the reward model's."
    return [samples_table([run.name for run in with_samples], rows), paragraph(note, soft=True)]


def _shown(sample: Json) -> tuple[str, list[str]]:
    badges = [f"score {sample['score']:.2f}"] if sample.get("score") is not None else []
    probs = sample.get("group_probs") or []
    if len(probs) > 1:
        group = max(range(len(probs)), key=probs.__getitem__)
        badges.append(f"group {group}: {probs[group]:.2f}")
    return sample["response"], badges


def _differences(runs: Sequence[Run]) -> list[str]:
    if len(runs) < 2:
        return []
    rows = [(key, *values) for key, values in config_differences(runs)]
    if not rows:
        return [paragraph("The runs have the same settings.")]
    return [table(Table(caption="", header=("key", *(run.name for run in runs)), rows=rows, is_text=True))]


def _changes(runs: Sequence[Run]) -> list[str]:
    """What resumes changed: curves of one run may be of several settings."""
    rows = [
        (run.name, str(change["iteration"]), change["key"], *(str(change.get(k, "")) for k in ("old", "new", "time")))
        for run in runs
        for change in run.changes
    ]
    header = ("run", "from iteration", "key", "before", "after", "when")
    return [table(Table(caption="", header=header, rows=rows, is_text=True))] if rows else []
