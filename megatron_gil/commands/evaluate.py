"""The commands `evaluate` and `report`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table as ConsoleTable

from megatron_gil.config import ConfigError
from megatron_gil.evaluation.judge import Judge, ScoreFn, ScoreJudge, is_comparable, recorded_scores
from megatron_gil.evaluation.winrate import HEADER, WinRate, table_rows, verdicts, win_rate
from megatron_gil.jsonl import iter_jsonl
from megatron_gil.paths import write_whole


def evaluate(arguments: argparse.Namespace, *, gold_score: ScoreFn) -> int:
    """Judge one response file against others, print the table, and write it where `output` says.

    gold_score: the miniature's true score; it is handed in because `demo/`, which defines it, lies on a floor above.
    """
    if arguments.output is not None and arguments.output.exists():
        raise ConfigError(f"{arguments.output} exists already; name another --output")
    files: list[Path] = [arguments.ours, *arguments.theirs]
    rows = {path: read_responses(path) for path in files}
    judge = _make_judge(arguments, rows, gold_score)
    ours = rows[arguments.ours]
    rates = {name: win_rate(verdicts(judge, ours, rows[path])) for name, path in _names(arguments.theirs).items()}
    _print_table(f"{arguments.ours} judged by {judge.name}", rates)
    if arguments.output is not None:
        table = {
            "ours": str(arguments.ours),
            "judge": judge.name,
            "opponents": {k: asdict(v) for k, v in rates.items()},
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(arguments.output, json.dumps(table, indent=2) + "\n")
    return 0


def report(arguments: argparse.Namespace) -> int:
    """Render run directories as one HTML page."""
    from megatron_gil.evaluation.report.report import write_report

    write_report(arguments.runs, arguments.output)
    print(arguments.output)
    return 0


def read_responses(path: Path) -> list[dict[str, str]]:
    """Rows of {"prompt", "response"}, with their other fields; ConfigError names file, line and field."""
    rows: list[dict[str, str]] = []
    for number, row in iter_jsonl(path):
        for field in ("prompt", "response"):
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                raise ConfigError(f'{path}:{number}: no text "{field}"; `megatron-gil generate` writes one')
        if not is_comparable(row.get("score")):
            raise ConfigError(f"{path}:{number}: the score {row['score']} cannot be compared; score again")
        rows.append(row)
    if not rows:
        raise ConfigError(f"{path}: holds no responses")
    return rows


def _make_judge(arguments: argparse.Namespace, rows: dict[Path, list[dict[str, str]]], gold_score: ScoreFn) -> Judge:
    if arguments.judge == "gold":
        return ScoreJudge("the gold score", gold_score, tie_margin=arguments.tie_margin)
    if arguments.judge == "llm":
        from megatron_gil.evaluation.llm_judge import LlmJudge

        if arguments.model is None:
            raise ConfigError("--judge llm needs --model, the judge's name on its server")
        return LlmJudge(model=arguments.model, criterion=arguments.criterion, base_url=arguments.base_url)
    names = ", ".join(map(str, rows))
    scored = recorded_scores((row for file in rows.values() for row in file), names)
    return ScoreJudge("the reward model's score", scored, tie_margin=arguments.tie_margin)


def _names(paths: Sequence[Path]) -> dict[str, Path]:
    """File names without their ending; whole paths where those are not distinct."""
    stems = [path.stem for path in paths]
    return dict(zip(stems if len(set(stems)) == len(stems) else map(str, paths), paths, strict=True))


def _print_table(title: str, rates: dict[str, WinRate]) -> None:
    shown = ConsoleTable(title=title, title_justify="left")
    for i, name in enumerate(HEADER):
        shown.add_column(name, justify="right" if i else "left")
    for row in table_rows(rates):
        shown.add_row(*row)
    Console().print(shown)
