"""What a report shows before any picture: a table for each kind of run, the alarms, and the terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_gil.evaluation.report.page import Table
from megatron_gil.evaluation.report.runs import Run

HELD_OUT = "eval/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Runs that have the same metrics."""

    name: str
    sign: str
    """A metric that only runs of this kind have."""
    columns: Mapping[str, str]
    """Metric -> header; metrics of held-out data stand first."""


KINDS = (
    Kind(
        name="PPO",
        sign="reward/score_mean",
        columns={
            "eval/reward/score_mean": "held-out score",
            "reward/score_mean": "score",
            "reward/return_mean": "return",
            "policy/kl_sequence": "KL a response",
            "policy/entropy": "entropy",
            "response/tokens": "tokens a response",
            "group/return_variance": "group variance",
            "time/tokens_per_s": "tokens/s",
        },
    ),
    Kind(
        name="Reward model",
        sign="reward/loss",
        columns={
            "eval/reward/accuracy": "held-out accuracy",
            "eval/reward/loss": "held-out reward loss",
            "reward/accuracy": "training accuracy",
            "reward/loss": "reward loss",
            "reward/margin": "margin",
            "time/tokens_per_s": "tokens/s",
        },
    ),
    Kind(
        name="DPO",
        sign="dpo/loss",
        columns={
            "eval/dpo/accuracy": "held-out accuracy",
            "eval/dpo/loss": "held-out DPO loss",
            "dpo/accuracy": "training accuracy",
            "dpo/loss": "DPO loss",
            "dpo/margin": "margin",
            "time/tokens_per_s": "tokens/s",
        },
    ),
    Kind(
        name="SFT",
        sign="sft/loss",
        columns={"eval/sft/loss": "held-out SFT loss", "sft/loss": "SFT loss", "time/tokens_per_s": "tokens/s"},
    ),
)

TERMS: Mapping[str, str] = {
    "held-out": "on data.eval, which is not trained on; the last evaluation",
    "score": "the reward model's number for a response (proxy: what is trained for, not what is wanted)",
    "gold": "the miniature's true score in [0, 1], which no training sees",
    "return": "score less the KL penalty, summed over a response",
    "KL": "how far the policy has moved from its reference: mean of log pi - log pi_ref, nats, a response or a token",
    "entropy": "spread of the next-token distribution, nats a token; near 0 the policy says one thing only",
    "SFT loss": "mean of -log pi over the tokens of the demonstrations, nats a token",
    "reward loss": "mean of -log sigmoid(score of the chosen - score of the rejected response), nats a pair",
    "DPO loss": "the same of the implicit rewards beta (log pi - log pi_ref), nats a pair",
    "accuracy": "share of pairs whose chosen response has the higher number; a tie counts one half",
    "margin": "mean of the chosen response's number less the rejected one's",
    "clipped policy ratios": "share of tokens whose pi / pi_old left [1 - clip_range, 1 + clip_range]",
    "value loss": "squared error of the critic's estimate of the return, half of it, clipped",
    "explained variance": "1 - variance of the critic's error / variance of the returns; 1 is perfect, 0 no help",
    "group": "a part of the data that the classifier infers, without labels, so that returns differ most between them",
    "group variance": "variance of the mean return between the inferred groups, which PPO-GIL penalises",
    "alarm": "a warning of training (alarms.* in the config); 1 in metrics.jsonl until it is clearly over",
}
"""Terms that a reader may not know. A table's header shows the meaning of the longest term that it contains, as a
hint."""

ALARMS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "kl": ("KL above alarms.max_kl", ("policy/kl_sequence", "policy/kl")),
    "kl_spike": ("KL leaps against its own recent mean", ("policy/kl_sequence", "policy/kl")),
    "kl_ahead": ("KL on its way to most of a first response's entropy", ("policy/kl_ahead", "policy/kl_sequence")),
    "score": (
        "scores outside what the reward model was trained on",
        ("reward/score_mean", "reward/out_of_range_fraction"),
    ),
    "entropy": ("entropy far below the first iteration's", ("policy/entropy",)),
    "length": ("responses much longer or shorter than at first", ("response/tokens",)),
    "duplicates": ("many prompts get the same response", ("response/duplicate_fraction",)),
    "sampling_mismatch": (
        "the sampler draws from another distribution than PPO's log-probs",
        ("policy/sampling_mismatch",),
    ),
    "group_mass": ("a group has almost no rows", ("group/return_variance",)),
    "group_information": ("the classifier's groups are all alike", ("group/return_variance",)),
}
"""Name -> (what it means, the metrics on whose curves it is drawn)."""


def overview(runs: Sequence[Run], color: Mapping[str, str]) -> list[Table]:
    """A table for each kind of run that there is, from the last stage of a pipeline to the first."""
    tables = []
    for kind in KINDS:
        if found := [run for run in runs if kind_of(run) is kind]:
            tables.append(_kind_table(kind, found, color))
    if left := [run for run in runs if kind_of(run) is None]:
        rows = [(run.name, str(len(run.metrics))) for run in left]
        tables.append(Table(caption="Other runs", header=("run", "iterations"), rows=rows, swatch=color))
    return tables


def kind_of(run: Run) -> Kind | None:
    """The first kind whose sign the run has; None where it has none."""
    return next((kind for kind in KINDS if run.series(kind.sign)[1]), None)


def _kind_table(kind: Kind, runs: Sequence[Run], color: Mapping[str, str]) -> Table:
    shown = {name: header for name, header in kind.columns.items() if any(run.series(name)[1] for run in runs)}
    rows = [(run.name, str(len(run.metrics)), *(number_text(run, name) for name in shown)) for run in runs]
    note = "Mean over the last tenth of the run" + "; held-out: the last evaluation" * any(
        name.startswith(HELD_OUT) for name in shown
    )
    return Table(
        caption=kind.name,
        header=("run", "iterations", *shown.values()),
        rows=rows,
        note=f"{note}.",
        hints={header: hint for header in shown.values() if (hint := _hint(header))},
        swatch=color,
    )


def number_text(run: Run, metric: str) -> str:
    """Its last evaluation for a metric of held-out data, else its mean over the last tenth of the run."""
    value = run.last(metric) if metric.startswith(HELD_OUT) else run.late_mean(metric)
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _hint(header: str) -> str:
    """The meaning of the longest term in a header."""
    found = [term for term in TERMS if term.lower() in header.lower()]
    return TERMS[max(found, key=len)] if found else ""


def alarm_table(runs: Sequence[Run], color: Mapping[str, str]) -> Table | None:
    """A table of the alarms that stood, and when. None where no run has alarms."""
    if not any(name.startswith("alarm/") for run in runs for name in run.names()):
        return None
    rows = []
    for run in runs:
        for name, spans in run.alarms().items():
            count = sum(last - first + 1 for first, last in spans)
            meaning = ALARMS[name][0] if name in ALARMS else ""
            rows.append((run.name, name, meaning, _span_text(spans), f"{count / max(1, len(run.metrics)):.0%}"))
    return Table(
        caption="Alarms" if rows else "No alarm stood in any run",
        header=("run", "alarm", "what it means", "iterations", "share of the run"),
        rows=rows,
        note="Iterations from 0, as in metrics.jsonl; bands on the curves, in the run's colour." if rows else "",
        is_text=True,
        swatch=color,
    )


def _span_text(spans: Sequence[tuple[int, int]], most: int = 6) -> str:
    shown = [f"{first} to {last}" if first < last else str(first) for first, last in spans[:most]]
    return ", ".join(shown) + f" and {len(spans) - most} more" * (len(spans) > most)


def spans_on(metric: str, run: Run) -> list[tuple[int, int]]:
    """The (first, last) iterations in which an alarm about this metric stood."""
    return [span for name, spans in run.alarms().items() if metric in ALARMS.get(name, ("", ()))[1] for span in spans]
