"""Run directories as one HTML page that needs no other file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TypeVar

from megatron_gil.config import ConfigError
from megatron_gil.evaluation.comparisons import pair_rows
from megatron_gil.evaluation.judge import ScoreJudge, recorded_scores
from megatron_gil.evaluation.report.figures import (
    PARTS_PALETTE,
    FrontierPoint,
    Series,
    colors,
    curve_grid,
    frontier,
    score_distributions,
    to_svg,
)
from megatron_gil.evaluation.report.overview import TERMS, alarm_table, overview, spans_on
from megatron_gil.evaluation.report.page import (
    PageSection,
    Picture,
    Table,
    definitions,
    grid,
    page,
    paragraph,
    picture,
    samples_table,
    table,
)
from megatron_gil.evaluation.report.runs import Json, Run, config_differences, read_runs
from megatron_gil.evaluation.winrate import HEADER, judge_all, table_rows, win_rate
from megatron_gil.paths import write_whole

T = TypeVar("T")

CURVES: Mapping[str, str] = {
    "eval/reward/accuracy": "held-out accuracy of the reward model",
    "eval/dpo/accuracy": "held-out accuracy of DPO",
    "eval/reward/score_mean": "held-out score",
    "eval/sft/loss": "held-out SFT loss, nats a token",
    "eval/reward/loss": "held-out reward loss, nats a pair",
    "eval/dpo/loss": "held-out DPO loss, nats a pair",
    "reward/score_mean": "score",
    "reward/return_mean": "return (score - KL penalty)",
    "reward/score_std": "standard deviation of the score",
    "reward/out_of_range_fraction": "share of scores out of range",
    "policy/kl_sequence": "KL, nats a response",
    "policy/kl": "KL, nats a token",
    "policy/kl_ahead": "KL in 20 iterations as it goes, nats a response",
    "policy/entropy": "entropy, nats a token",
    "response/tokens": "response length, tokens",
    "response/duplicate_fraction": "share of repeated responses",
    "policy/sampling_mismatch": "sampler against log-probs, nats a token",
    "policy/clip_fraction": "share of clipped policy ratios",
    "critic/value_loss": "value loss",
    "critic/explained_variance": "explained variance of the returns",
    "group/return_variance": "variance of returns between groups",
    "sft/loss": "SFT loss, nats a token",
    "reward/loss": "reward loss, nats a pair",
    "reward/accuracy": "training accuracy of the reward model",
    "dpo/loss": "DPO loss, nats a pair",
    "dpo/accuracy": "training accuracy of DPO",
    "dpo/margin": "DPO margin",
    "time/tokens_per_s": "tokens a second",
}
"""Metric -> its title, of the metrics that have a panel with all runs in it; held-out ones first. All others are in
metrics.jsonl alone."""

GROUP_CURVES: Mapping[str, str] = {
    r"reward/score_mean_group_(\d+)": "score per inferred group",
    r"group/return_(\d+)": "return per inferred group",
    r"group/mass_(\d+)": "mass of the inferred group",
    r"policy/kl_group_(\d+)": "KL per inferred group",
    r"policy/entropy_group_(\d+)": "entropy per inferred group",
    r"response/duplicate_fraction_group_(\d+)": "share of repeated responses per inferred group",
}
"""Patterns of metrics, a panel for each and a line per inferred group."""

KNOWN_CURVES = r"reward/score_mean_known_(.+)"

SAMPLE_ROWS = 8
LAST_EVENTS = 5
"""How many of the last iterations with samples are shown, to tell how a run ended."""
FRONTIER_POINTS = 12


def write_report(
    run_dirs: Sequence[Path],
    output: Path,
    *,
    title: str = "megatron-gil report",
    introduction: str = "",
    tables: Sequence[Table] = (),
    pictures: Sequence[Picture] = (),
    names: Sequence[str] | None = None,
) -> None:
    """Write `output`, an existing file included; `tables` and `pictures` come first, under "Results".

    names: of the runs; None: from their directories. A run has the colour that `colors` gives to it among all names.
    """
    runs = read_runs(run_dirs, names)
    color = colors([run.name for run in runs])
    alarms = alarm_table(runs, color)
    sections = [
        PageSection(title="Results", body=[*map(table, tables), *map(picture, pictures)]),
        PageSection(title="Runs", body=[*map(table, overview(runs, color)), paragraph(_origins(runs), soft=True)]),
        PageSection(title="Alarms", body=[] if alarms is None else [table(alarms)]),
        PageSection(title="Training curves", body=_curves(runs, color)),
        PageSection(title="Groups", body=_group_curves(runs)),
        PageSection(title="Scores", body=[*_distributions(runs, color), *_frontier(runs, color), *_wins(runs)]),
        PageSection(title="Responses side by side", body=_samples(runs)),
        PageSection(title="Rows of training", body=_rows(runs)),
        PageSection(title="Config differences", body=_differences(runs)),
        PageSection(title="Config changes during a run", body=_changes(runs)),
        PageSection(title="Terms", body=[definitions(TERMS)]),
    ]
    text = page(title, introduction or f"{len(runs)} run{'s' * (len(runs) != 1)}.", sections)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, text)
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written: {error.strerror}; choose another --output") from None


def _origins(runs: Sequence[Run]) -> str:
    origins = dict.fromkeys(run.origin for run in runs if run.origin)
    return f"Written by {'; '.join(origins)}." if origins else ""


def _curves(runs: Sequence[Run], color: Mapping[str, str]) -> list[str]:
    panels = []
    for metric, label in CURVES.items():
        least = 2 if metric.startswith("eval/") else 1  # a single evaluation is in the table above already
        lines = {run.name: line for run in runs if len((line := run.series(metric))[1]) >= least}
        if lines:
            spans = {run.name: found for run in runs if run.name in lines and (found := spans_on(metric, run))}
            drawn = curve_grid({label: lines}, color=color, alarms={label: spans}, legend=False)
            panels.append(Picture(svg=to_svg(drawn), caption=label, is_panel=True))
    note = (
        "Faint: each iteration. Full: mean of the last twentieth of the run's length. Bands, and strips at the foot: "
    )
    note += "an alarm stood in the run of that colour."
    return grid(panels, color, note) if panels else []


def _group_curves(runs: Sequence[Run]) -> list[str]:
    """A grid of panels per run, whose lines are its groups, in colours that no run has."""
    body: list[str] = []
    known = {run.name: lines for run in runs if (lines := _matching(run, KNOWN_CURVES))}
    if known:
        body += _parts_grid(known, "Score per label that came with the data, a panel per run.", share_y=True)
    for run in runs:
        panels = {label: lines for pattern, label in GROUP_CURVES.items() if (lines := _matching(run, pattern))}
        if any(len(lines) > 1 for lines in panels.values()):  # plain PPO has one group, all of the batch
            body += _parts_grid(panels, f"{run.name}: the groups that its classifier inferred.")
    return body


def _parts_grid(panels: Mapping[str, Mapping[str, Series]], note: str, *, share_y: bool = False) -> list[str]:
    color = colors(sorted({name for lines in panels.values() for name in lines}), PARTS_PALETTE)
    limits = _limits([y for lines in panels.values() for _, y in lines.values()]) if share_y else None
    drawn = {title: curve_grid({title: lines}, color=color, legend=False) for title, lines in panels.items()}
    for figure in drawn.values():
        if limits is not None:
            figure.axes[0].set_ylim(*limits)
    return grid([Picture(svg=to_svg(f), caption=title, is_panel=True) for title, f in drawn.items()], color, note)


def _limits(curves: Sequence[Sequence[float]]) -> tuple[float, float]:
    values = [value for curve in curves for value in curve]
    margin = 0.05 * ((max(values) - min(values)) or 1.0)
    return min(values) - margin, max(values) + margin


def _matching(run: Run, pattern: str) -> dict[str, Series]:
    found = ((re.fullmatch(pattern, name), name) for name in run.names())
    return {(f"group {m[1]}" if m[1].isdigit() else m[1]): run.series(name) for m, name in found if m}


def _distributions(runs: Sequence[Run], color: Mapping[str, str]) -> list[str]:
    scores = {
        run.name: [s["score"] for s in run.last_samples(LAST_EVENTS) if s.get("score") is not None] for run in runs
    }
    scores = {name: found for name, found in scores.items() if found}
    if not scores:
        return []
    caption = f"Reward-model scores of the samples of the last {LAST_EVENTS} iterations that kept some; dashed: the "
    caption += "normal distribution of the same mean and spread."
    return [picture(Picture(svg=to_svg(score_distributions(scores, color=color)), caption=caption))]


def _frontier(runs: Sequence[Run], color: Mapping[str, str]) -> list[str]:
    """Score against KL over training; each point is the mean over an equal part of the run."""
    points = {run.name: found for run in runs if (found := _points(run))}
    if not points:
        return []
    caption = "Reward-model score against the distance from the reference model; the filled point is the end."
    return [picture(Picture(svg=to_svg(frontier(points, color=color)), caption=caption))]


def _points(run: Run) -> list[FrontierPoint]:
    found = ((row.get("policy/kl_sequence"), row.get("reward/score_mean")) for row in run.metrics)
    rows = [(kl, score) for kl, score in found if kl is not None and score is not None]
    parts = _parts(rows, max(1, len(rows) // FRONTIER_POINTS))
    return [FrontierPoint(kl=fmean(kl for kl, _ in part), proxy=fmean(score for _, score in part)) for part in parts]


def _parts(rows: list[T], size: int) -> list[list[T]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _wins(runs: Sequence[Run]) -> list[str]:
    """The first run against each of the others, on prompts that both answered in the same iteration."""
    ours, rates = {(s["iteration"], s["prompt"]): s for s in runs[0].last_samples(LAST_EVENTS)}, {}
    for run in runs[1:]:
        theirs = {(s["iteration"], s["prompt"]): s for s in run.last_samples(LAST_EVENTS)}
        rows = [(ours[key], theirs[key]) for key in ours if key in theirs]
        rows = [(a, b) for a, b in rows if a.get("score") is not None and b.get("score") is not None]
        if rows:
            judge = ScoreJudge("score", recorded_scores((row for pair in rows for row in pair), "samples.jsonl"))
            rates[run.name] = win_rate(
                judge_all(judge, pair_rows([a for a, _ in rows], [b for _, b in rows], run.name))
            )
    if not rates:
        return []
    note = "By the score in samples.jsonl, of each run's own reward model, which training drives up: compare with a "
    note += "judge that did not take part (megatron-gil evaluate)."
    caption = f"{runs[0].name} against the others on the same training prompts: win / tie / lose"
    return [table(Table(caption=caption, header=HEADER, rows=table_rows(rates), note=note))]


def _samples(runs: Sequence[Run]) -> list[str]:
    with_samples = [run for run in runs if run.responses]
    if not with_samples:
        return []
    latest = {run.name: run.last_samples(1) for run in with_samples}
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


def _rows(runs: Sequence[Run]) -> list[str]:
    """Rows of the last update of sft, reward and dpo, with the numbers that the run gave them."""
    body = []
    for run in runs:
        rows = [s for s in run.samples if "response" not in s and s["iteration"] == run.samples[-1]["iteration"]]
        if rows:
            header = [key for key in rows[0] if key not in ("iteration", "score_chosen", "reward_chosen")]
            header = [key for key in header if key not in ("score_rejected", "reward_rejected")]
            cells = [[f"{v:.3f}" if isinstance(v := s.get(k), float) else str(v) for k in header] for s in rows]
            body.append(table(Table(caption=run.name, header=header, rows=cells[:SAMPLE_ROWS], is_text=True)))
    note = "Of the last iteration in samples.jsonl. loss: nats a token of the target; margin: the chosen response's "
    note += "number less the rejected one's. Both as the model was before that update."
    return [*body, paragraph(note, soft=True)] if body else []


def _differences(runs: Sequence[Run]) -> list[str]:
    if len(runs) < 2:
        return []
    rows = [(key, *values) for key, values in config_differences(runs)]
    if not rows:
        return [paragraph("The runs have the same settings.")]
    return [table(Table(caption="", header=("key", *(run.name for run in runs)), rows=rows, is_text=True))]


def _changes(runs: Sequence[Run]) -> list[str]:
    """The settings that resumes changed: one run's curves may come from several settings."""
    rows = [
        (run.name, str(change["iteration"]), change["key"], *(str(change.get(k, "")) for k in ("old", "new", "time")))
        for run in runs
        for change in run.changes
    ]
    header = ("run", "from iteration", "key", "before", "after", "when")
    return [table(Table(caption="", header=header, rows=rows, is_text=True))] if rows else []
