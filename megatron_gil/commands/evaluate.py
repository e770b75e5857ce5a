"""`megatron-gil evaluate`: win/tie/lose of one file of responses against others, prompt by prompt.

    megatron-gil evaluate scores/ppo_gil.jsonl scores/ppo_kl.jsonl scores/dpo.jsonl --output tables/hh.json

All files answer the same prompts in the same order, as `megatron-gil generate` writes them. Exit code 2: a file or an
option is wrong, one line on stderr says how.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table as ConsoleTable

from megatron_gil.config import ConfigError
from megatron_gil.config.ranges import Range
from megatron_gil.evaluation.comparisons import pair_files, read_responses
from megatron_gil.evaluation.judge import Judge, ScoreFn, ScoreJudge, recorded_scores
from megatron_gil.evaluation.rubrics import read_rubric
from megatron_gil.evaluation.winrate import HEADER, WinRate, table_rows, verdicts, win_rate
from megatron_gil.paths import expand_user, write_whole


def evaluate(arguments: Sequence[str], *, gold_score: ScoreFn) -> int:
    """Judge, print the table, and write it where --output says.

    gold_score: the miniature's true score; it is handed in because `demo/`, which defines it, lies on a floor above.
    """
    given = _parse(arguments)
    if given.output is not None and given.output.exists():
        raise ConfigError(f"{given.output} exists already; name another --output")
    comparisons = pair_files(given.ours, given.theirs)
    judge = _make_judge(given, gold_score)
    rates = {name: win_rate(verdicts(judge, rows)) for name, rows in comparisons.items()}
    _print_table(f"{given.ours} judged by {judge.name}", rates)
    if given.output is not None:
        table = {
            "ours": str(given.ours),
            "judge": judge.name,
            "opponents": {k: asdict(v) for k, v in rates.items()},
        }
        given.output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(given.output, json.dumps(table, indent=2) + "\n")
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="megatron-gil evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ours", type=expand_user, metavar="OURS.jsonl", help="responses: {prompt, response} lines")
    parser.add_argument("theirs", type=expand_user, nargs="+", metavar="THEIRS.jsonl", help="opponents, same prompts")
    parser.add_argument("--judge", choices=("score", "gold", "llm"), default="score", help="who decides")
    parser.add_argument("--tie-margin", type=float, default=0.0, help="score difference that is a tie")
    parser.add_argument("--model", help="llm: the judge's model name")
    parser.add_argument("--base-url", help="llm: an OpenAI-compatible server")
    parser.add_argument(
        "--rubric",
        default="helpful",
        metavar="NAME_OR_FILE",
        help="helpful (default), harmless, summary or a text file",
    )
    parser.add_argument("--output", type=expand_user, metavar="FILE.json", help="also write the table there")
    given = parser.parse_args(arguments)
    bounds = Range(low=0, high=float("inf"))
    if given.tie_margin not in bounds:
        raise ConfigError(f"--tie-margin {given.tie_margin} must be {bounds}")
    return given


def _make_judge(given: argparse.Namespace, gold_score: ScoreFn) -> Judge:
    if given.judge == "gold":
        return ScoreJudge("the gold score", gold_score, tie_margin=given.tie_margin)
    if given.judge == "llm":
        from megatron_gil.evaluation.llm_judge import LlmJudge

        if given.model is None:
            raise ConfigError("--judge llm needs --model, the judge's name on its server")
        return LlmJudge(model=given.model, rubric=read_rubric(given.rubric), base_url=given.base_url)
    files: list[Path] = [given.ours, *given.theirs]
    scored = recorded_scores((row for path in files for row in read_responses(path)), ", ".join(map(str, files)))
    return ScoreJudge("the reward model's score", scored, tie_margin=given.tie_margin)


def _print_table(title: str, rates: Mapping[str, WinRate]) -> None:
    shown = ConsoleTable(title=title, title_justify="left")
    for i, name in enumerate(HEADER):
        shown.add_column(name, justify="right" if i else "left")
    for row in table_rows(rates):
        shown.add_row(*row)
    Console().print(shown)
