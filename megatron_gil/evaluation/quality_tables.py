"""A reward model's quality as tables, as sentences, and as a Markdown page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_gil.evaluation.calibration import Bin
from megatron_gil.evaluation.report.page import Table
from megatron_gil.evaluation.reward_quality import Quality, RewardQuality
from megatron_gil.evaluation.statistics import Estimate
from megatron_gil.evaluation.tables import markdown_table, percent_interval

HEADER = ("", "pairs", "accuracy, % [95 %]", "margin", "log-loss", "ECE", "T")
TERMS = (
    "accuracy: share of pairs whose chosen response scores higher, ties half. margin: mean of score(chosen) - "
    "score(rejected). log-loss: mean of -log sigmoid(margin), nats; 0.693 is a coin. ECE: how far confidence and "
    "accuracy lie apart. T: what margins should be divided by; above 1 they are too large. Lengths in characters."
)


def quality_table(found: RewardQuality) -> Table:
    """A row for all pairs, then each division of them: a row with its name, and a row for each part."""
    rows = [_cells("all", found.overall)]
    for by, parts in found.slices.items():
        rows += [(f"by {by}", *[""] * (len(HEADER) - 1)), *(_cells(f"  {name}", part) for name, part in parts.items())]
    return Table(caption=f"reward on {', '.join(found.sources)}", header=HEADER, rows=rows, note=TERMS)


def bins_table(bins: Sequence[Bin]) -> Table:
    """The reliability diagram in numbers."""
    return Table(
        caption="reliability, all pairs",
        header=("confidence", "pairs", "mean confidence", "accuracy [95 %]"),
        rows=[
            (f"{b.low:.3f} to {b.high:.3f}", f"{b.num_pairs:,}", f"{b.confidence:.3f}", str(b.accuracy)) for b in bins
        ],
        note="Bins of equally many pairs. [ ]: Wilson's interval, which takes pairs as independent.",
    )


def _cells(name: str, found: Quality) -> tuple[str, ...]:
    return (
        name,
        f"{found.num_pairs:,}",
        percent_interval(found.accuracy),
        _number(found.margin.value, "+z.2f"),
        _number(found.log_loss.value, ".3f"),
        f"{found.calibration_error.value:.3f}",
        _number(found.temperature.value.value, ".2f"),
    )


def _number(value: float, form: str) -> str:
    if math.isnan(value):
        return "-"
    return format(value, form) if abs(value) < 10_000 else f"{value:.3g}"


def sentences(found: RewardQuality) -> tuple[str, ...]:
    """What the numbers over all pairs say."""
    return (_counted(found), _calibration(found.overall), _temperature(found.overall), _length(found.overall))


def _counted(found: RewardQuality) -> str:
    overall = found.overall
    text = f"{overall.num_pairs:,} pairs of {overall.num_prompts:,} prompts; {overall.num_ties:,} have equal scores"
    if found.num_identical:
        text += f"; {found.num_identical:,} rows of two identical responses are left out"
    return text + "."


def _calibration(found: Quality) -> str:
    error, mean, high = found.calibration_error, found.calibrated_mean, found.calibrated_high
    shown = error.value > high
    return (
        f"ECE {_interval(error)}; a perfectly calibrated model would show {mean:.3f} on as many pairs, and more than "
        f"{high:.3f} in one case of twenty: "
        f"{'this one is miscalibrated' if shown else 'no miscalibration is shown'}."
    )


def _temperature(found: Quality) -> str:
    best = found.temperature
    if math.isnan(best.value.value):
        return "T: all scores are equal in their pairs, so no temperature is best."
    if best.value.value == 0:
        return "T = 0: no pair is ranked wrong, so that larger margins always fit better."
    if math.isinf(best.value.value):
        return "T is infinite: the mean margin is not above 0, so that no margin at all fits best."
    low, high = best.value.low, best.value.high
    verdict = "margins are too large" if low > 1 else "margins are too small" if high < 1 else "1 is not ruled out"
    return (
        f"T = {_interval(best.value, '.2f')}: {verdict}; divided by it, log-loss goes from "
        f"{_number(found.log_loss.value, '.3f')} to {best.log_loss:.3f}, ECE from {found.calibration_error.value:.3f} "
        f"to {best.calibration_error:.3f} (on the same pairs)."
    )


def _length(found: Quality) -> str:
    bias = found.length
    if math.isnan(bias.longer_is_chosen.value):
        return "Length: all pairs are of equally long responses."
    scored, chosen = 100 * bias.longer_scores_higher.value, 100 * bias.longer_is_chosen.value
    tied = "is not defined" if math.isnan(bias.correlation.value) else f"is {_interval(bias.correlation, '.2f')}"
    return (
        f"Length: the longer response scores higher in {scored:.1f} % of pairs and is the chosen one in {chosen:.1f} "
        f"%; rank correlation of the differences in score and length {tied}."
    )


def _interval(found: Estimate, form: str = ".3f") -> str:
    if math.isnan(found.low):
        return _number(found.value, form)
    return f"{_number(found.value, form)} [{_number(found.low, form)}, {_number(found.high, form)}]"


def as_markdown(found: RewardQuality, picture: str) -> str:
    """picture: the name of the file that holds it."""
    said = "".join(f"- {sentence}\n" for sentence in sentences(found))
    tables = (quality_table(found), bins_table(found.overall.bins))
    return "\n".join([said, f"![reliability and margins]({picture})\n", *map(markdown_table, tables)])
