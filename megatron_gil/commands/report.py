"""The command `report`."""

from __future__ import annotations

import argparse


def report(arguments: argparse.Namespace) -> int:
    """Render run directories as one HTML page."""
    from megatron_gil.evaluation.report.report import write_report

    write_report(arguments.runs, arguments.output)
    print(arguments.output)
    return 0
