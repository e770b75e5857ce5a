"""Runs one cell in one process: train, answer, score, measure. Started by run.py; prints into the cell's log."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from cells import LONGER_CHOSEN, Cell, Place, commands, read_grid, write_longer_chosen
from measure import measure

from megatron_gil import cli


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grid", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--cell", required=True)
    arguments = parser.parse_args()
    cells = read_grid(arguments.grid)
    return run_cell(Place(output=arguments.output, seed=arguments.seed, cell=cells[arguments.cell]), cells)


def run_cell(place: Place, cells: Mapping[str, Cell]) -> int:
    """Exit code of the first command that fails, or 0 once the cell's rows are written."""
    started = time.monotonic()
    for unfinished in ("replies.jsonl", place.replies.name):
        (place.cell_dir / unfinished).unlink(missing_ok=True)
    if any(LONGER_CHOSEN in setting for setting in place.cell.settings):
        write_longer_chosen(place.seed_dir)
    for command in commands(place, cells):
        code = cli.main(command)
        if code:
            return code
    seconds = {"seconds": time.monotonic() - started}
    rows = [
        {"seed": place.seed, "method": place.cell.name, "metric": metric, "value": value}
        for metric, value in (measure(place.run_dir, place.replies) | seconds).items()
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    partial = place.rows.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(place.rows)  # a cell is finished or it is not
    return 0


if __name__ == "__main__":
    sys.exit(main())
