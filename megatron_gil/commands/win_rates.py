"""`megatron-gil win-rates`: the verdicts of several judges, tasks and opponents as tables and a picture.

    megatron-gil win-rates tables/*.judgments.jsonl --output tables/all.json

A FILE.judgments.jsonl is what `megatron-gil evaluate --output FILE.json` writes, whoever judges. Written are FILE.json,
and FILE.csv, FILE.md and FILE.svg beside it. Exit code 2: a file or an option is wrong, one line on stderr says how.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as ConsoleTable

from megatron_gil.config import ConfigError
from megatron_gil.evaluation.comparisons import Judgment, judgment_rows, read_judgments
from megatron_gil.evaluation.report.page import Table
from megatron_gil.evaluation.tables import Summary, as_csv, as_json, as_markdown, console_tables, summarise
from megatron_gil.paths import expand_user, write_new


def win_rates(arguments: Sequence[str]) -> int:
    """Prints the tables and writes them where --output says."""
    parser = argparse.ArgumentParser(
        prog="megatron-gil win-rates", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("judgments", type=expand_user, nargs="+", metavar="JUDGMENTS.jsonl")
    parser.add_argument("--output", type=expand_user, metavar="FILE.json", help="also write the tables there")
    given = parser.parse_args(arguments)
    check_outputs(given.output)
    summary = summarise([judgment for path in given.judgments for judgment in read_judgments(path)])
    show(summary)
    if given.output is not None:
        write_tables(given.output, summary, as_json(summary))
    return 0


def output_files(output: Path) -> dict[str, Path]:
    """What is written where --output names a file: that one, and others of the same name."""
    endings = {"judgments": ".judgments.jsonl", "csv": ".csv", "picture": ".svg", "markdown": ".md", "json": ".json"}
    return {kind: output.with_suffix(ending) for kind, ending in endings.items()}


def check_outputs(output: Path | None) -> None:
    """ConfigError where it does not end in .json or where one of its files is there."""
    if output is None:
        return
    if output.suffix != ".json":
        raise ConfigError(f"--output {output} must end in .json; the other tables get its name")
    for path in output_files(output).values():
        if path.exists():
            raise ConfigError(f"{path} exists already; name another --output")


def show(summary: Summary) -> None:
    """On standard output. Of several judges or tasks the win rates, a table each, and their agreement; the rest stands
    in the files."""
    console = Console()
    for place, table in enumerate(console_tables(summary)):
        if place:
            console.print()
        print_table(console, table)


def print_table(console: Console, table: Table) -> None:
    """The first column takes more lines where the console is narrow."""
    shown = ConsoleTable(
        title=escape(table.caption),
        title_justify="left",
        caption=escape(table.note),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for i, name in enumerate(table.header):
        shown.add_column(escape(name), justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
    for row in table.rows:
        shown.add_row(*map(escape, row))
    console.print(shown)


def write_tables(
    output: Path, summary: Summary, content: Mapping[str, Any], judgments: Sequence[Judgment] | None = None
) -> None:
    """content: of the file that `output` names, which is written last. judgments: None where they lie in files."""
    from megatron_gil.evaluation.report.figures import to_svg  # matplotlib
    from megatron_gil.evaluation.report.judged import win_bars

    paths = output_files(output)
    texts = {
        "csv": as_csv(summary),
        "picture": to_svg(win_bars(summary.cells)),
        "markdown": as_markdown(summary, paths["picture"].name),
        "json": json.dumps(content, indent=2) + "\n",
    }
    if judgments is not None:
        texts = {"judgments": "".join(json.dumps(row) + "\n" for row in judgment_rows(judgments)), **texts}
    try:
        write_new({paths[kind]: text for kind, text in texts.items()})
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written: {error.strerror}; choose another --output") from None
