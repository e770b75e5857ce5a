"""The command `report`."""

from __future__ import annotations

import argparse

from megatron_gil.evaluation.comparisons import Judgment, read_judgments
from megatron_gil.evaluation.report.page import Picture, Table


def report(arguments: argparse.Namespace) -> int:
    """Render run directories, and what judges said of their responses, as one HTML page."""
    from megatron_gil.evaluation.report.report import write_report

    judgments = [judgment for path in arguments.judgments for judgment in read_judgments(path)]
    tables, pictures = _of_judgments(judgments) if judgments else ([], [])
    write_report(arguments.runs, arguments.output, tables=tables, pictures=pictures)
    print(arguments.output)
    return 0


def _of_judgments(judgments: list[Judgment]) -> tuple[list[Table], list[Picture]]:
    from megatron_gil.evaluation.report.figures import to_svg
    from megatron_gil.evaluation.report.judged import length_curves, win_bars
    from megatron_gil.evaluation.tables import summarise, text_tables

    summary = summarise(judgments)
    length = "Wins and half of the ties over our length less theirs, in fifths of the comparisons; 95 % intervals."
    pictures = [
        Picture(svg=to_svg(win_bars(summary.cells)), caption="win / tie / lose, % of prompts"),
        Picture(svg=to_svg(length_curves(summary.cells)), caption=length),
    ]
    return text_tables(summary), pictures
