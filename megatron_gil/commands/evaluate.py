"""`megatron-gil evaluate`: win/tie/lose of one file of responses against others, prompt by prompt.

    megatron-gil evaluate scores/ppo_gil.jsonl scores/ppo_kl.jsonl scores/dpo.jsonl --output tables/hh.json

All files answer the same prompts in the same order, as `megatron-gil generate` writes them. With --output the table is
also written as CSV, Markdown and a picture beside FILE.json, and each verdict into FILE.judgments.jsonl, from which
`megatron-gil win-rates` makes tables of several judges and tasks. Exit code 2: a file or an option is wrong, one line
on stderr says how. A language model's answers are kept, and the same command goes on after 1 (its server or the limit
on cost ended it) and 75 (a signal did).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_gil.commands.evaluate_llm import add_options, check_options, dry_run, judge_by_llm
from megatron_gil.commands.win_rates import check_outputs, show, write_tables
from megatron_gil.config import ConfigError
from megatron_gil.config.ranges import Range
from megatron_gil.evaluation.comparisons import Comparison, Judgment, Row, pair_read, read_responses
from megatron_gil.evaluation.judge import Judge, ScoreFn, ScoreJudge, recorded_scores
from megatron_gil.evaluation.tables import as_json, summarise
from megatron_gil.evaluation.web.store import read_ratings
from megatron_gil.evaluation.winrate import judge_all
from megatron_gil.paths import expand_user


def evaluate(arguments: Sequence[str], *, gold_score: ScoreFn) -> int:
    """Judge, print the tables, and write them where --output says.

    gold_score: the miniature's true score; it is handed in because `demo/`, which defines it, lies on a floor above.
    """
    given = _parse(arguments)
    check_outputs(given.output)
    rows = {path: read_responses(path) for path in (given.ours, *given.theirs)}
    comparisons = pair_read(rows, given.ours, given.theirs)
    if given.dry_run:
        return dry_run(given, comparisons)
    judgments = _judge(given, rows, comparisons, gold_score)
    summary = summarise(judgments)
    show(summary)
    if given.output is not None:
        write_tables(given.output, summary, as_json(summary)["tables"][0], judgments)
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="megatron-gil evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ours", type=expand_user, metavar="OURS.jsonl", help="responses: {prompt, response} lines")
    parser.add_argument("theirs", type=expand_user, nargs="+", metavar="THEIRS.jsonl", help="opponents, same prompts")
    parser.add_argument("--judge", choices=("score", "llm", "people", "gold"), default="score", help="who decides")
    parser.add_argument("--task", default="", metavar="NAME", help="of the prompt set, for the tables")
    parser.add_argument("--tie-margin", type=float, default=0.0, help="score difference that is a tie")
    parser.add_argument("--ratings", type=expand_user, metavar="FILE.sqlite", help="people: what judge-web wrote")
    parser.add_argument("--output", type=expand_user, metavar="FILE.json", help="also write the tables there")
    add_options(parser)
    given = parser.parse_args(arguments)
    bounds = Range(low=0, high=float("inf"))
    if given.tie_margin not in bounds:
        raise ConfigError(f"--tie-margin {given.tie_margin} must be {bounds}")
    check_options(given)
    if (given.ratings is None) == (given.judge == "people"):
        raise ConfigError(
            "--judge people and --ratings FILE.sqlite, which `megatron-gil judge-web` writes, go together"
        )
    return given


def _judge(
    given: argparse.Namespace,
    rows: Mapping[Path, Sequence[Row]],
    comparisons: Mapping[str, Sequence[Comparison]],
    gold_score: ScoreFn,
) -> list[Judgment]:
    if given.judge == "llm":
        return judge_by_llm(given, comparisons)
    if given.judge == "people":
        return _judge_by_people(given, comparisons)
    judge = _make_judge(given, rows, gold_score)
    return [
        judgment
        for opponent, pairs in comparisons.items()
        for judgment in judge_all(judge, pairs, task=given.task, policy=given.ours.stem, opponent=opponent)
    ]


def _judge_by_people(given: argparse.Namespace, comparisons: Mapping[str, Sequence[Comparison]]) -> list[Judgment]:
    """What each rater said of each comparison that was rated; ConfigError where none was."""
    said: dict[Comparison, dict[str, Judgment]] = {}
    for judgment in read_ratings(given.ratings):
        said.setdefault(judgment.comparison, {})[judgment.rater] = judgment
    pairs = [(opponent, comparison) for opponent, rows in comparisons.items() for comparison in dict.fromkeys(rows)]
    num_rated = sum(comparison in said for _, comparison in pairs)
    if not num_rated:
        raise ConfigError(f"{given.ratings}: rates none of the pairs of {given.ours} and {', '.join(comparisons)}")
    print(f"{num_rated:,} of {len(pairs):,} pairs are rated in {given.ratings}", file=sys.stderr)
    return [
        replace(judgment, task=given.task, policy=given.ours.stem, opponent=opponent)
        for opponent, comparison in pairs
        for judgment in said.get(comparison, {}).values()
    ]


def _make_judge(given: argparse.Namespace, rows: Mapping[Path, Sequence[Row]], gold_score: ScoreFn) -> Judge:
    if given.judge == "gold":
        return ScoreJudge("gold", gold_score, tie_margin=given.tie_margin)
    scored = recorded_scores((row for file in rows.values() for row in file), ", ".join(map(str, rows)))
    return ScoreJudge("reward model", scored, tie_margin=given.tie_margin)
