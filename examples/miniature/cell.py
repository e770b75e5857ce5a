"""A process of run.py, which runs cells one after the other: train, answer, score, measure. Prints into their logs."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from cells import LONGER_CHOSEN, Cell, Place, commands, read_grid, write_longer_chosen, write_repeated
from measure import measure
from reach import measure_reach

from megatron_gil import cli
from megatron_gil.demo.stages import serve
from megatron_gil.training.run.signals import StopSignal


def main(argv: list[str], stop: StopSignal) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grid", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--cell", required=True)
    arguments = parser.parse_args(argv)
    cells = read_grid(arguments.grid)
    return run_cell(Place(output=arguments.output, seed=arguments.seed, cell=cells[arguments.cell]), cells, stop)


def run_cell(place: Place, cells: Mapping[str, Cell], stop: StopSignal) -> int:
    """Exit code of the first command that fails, or 0 once the cell's rows are written."""
    started = time.monotonic()
    for unfinished in ("replies.jsonl", place.replies.name, place.pairs.name):
        (place.cell_dir / unfinished).unlink(missing_ok=True)
    if any(LONGER_CHOSEN in setting for setting in place.cell.settings):
        write_longer_chosen(place.seed_dir)
    if place.cell.command == "sample":
        write_repeated(place.seed_dir)
    for command in commands(place, cells):
        code = cli.main(command, stop)
        if code:
            return code
    sampled = place.cell.command == "sample"
    numbers = measure_reach(place.replies, place.pairs) if sampled else measure(place.run_dir, place.replies)
    numbers["seconds"] = time.monotonic() - started
    rows = [
        {"seed": place.seed, "method": place.cell.name, "metric": metric, "value": value}
        for metric, value in numbers.items()
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    partial = place.rows.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(place.rows)  # a cell is finished or it is not
    return 0


if __name__ == "__main__":
    sys.exit(serve(main))
