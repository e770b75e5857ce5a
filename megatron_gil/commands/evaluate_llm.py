"""The options of `megatron-gil evaluate --judge llm`, and what it does before the first request."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_gil.config import ConfigError
from megatron_gil.config.ranges import Range
from megatron_gil.evaluation.comparisons import Comparison, Judgment
from megatron_gil.evaluation.llm_judge.answers import AnswerStore
from megatron_gil.evaluation.llm_judge.cost import BYTES_A_TOKEN, TOKENS_AN_ANSWER, Price, most_tokens_in
from megatron_gil.evaluation.llm_judge.plan import Plan, plan_questions
from megatron_gil.evaluation.llm_judge.prompts import Question
from megatron_gil.evaluation.llm_judge.standing import standing_of
from megatron_gil.evaluation.rubrics import RUBRICS, read_rubric
from megatron_gil.paths import expand_user

ANSWERS = "judge_answers.sqlite"
"""Beside the output: evaluations in one directory share it."""
_RANGES = {
    "concurrency": Range(low=1, high=1000),
    "requests_per_minute": Range(low=0, high=1e9, with_low=False),
    "timeout": Range(low=0, high=86_400, with_low=False),
    "max_tokens": Range(low=1, high=1_000_000),
    "max_cost": Range(low=0, high=float("inf"), with_low=False),
}
_PRICE = Range(low=0, high=float("inf"))


def add_options(parser: argparse.ArgumentParser) -> None:
    options = parser.add_argument_group(
        "--judge llm", "an OpenAI-compatible server; the key is read from OPENAI_API_KEY"
    )
    options.add_argument("--model", metavar="NAME", help="the judge, as its server calls it")
    options.add_argument("--base-url", metavar="URL", help="of the server (default: OPENAI_BASE_URL, or OpenAI's)")
    options.add_argument(
        "--rubric", metavar="NAME_OR_FILE", help=f"{', '.join(RUBRICS)} or a text file (default helpful)"
    )
    options.add_argument("--concurrency", type=int, metavar="N", help="requests in flight (default 16)")
    options.add_argument("--requests-per-minute", type=float, metavar="N", help="no more than that (default: no limit)")
    options.add_argument("--timeout", type=float, metavar="S", help="seconds for a whole request (default 120)")
    options.add_argument("--max-tokens", type=int, metavar="N", help="of an answer, thoughts included (default 1024)")
    options.add_argument(
        "--price-per-million", type=float, nargs=2, metavar=("IN", "OUT"), help="price of a million tokens"
    )
    options.add_argument("--max-cost", type=float, metavar="SUM", help="ends before this command spends more")
    options.add_argument(
        "--answers", type=expand_user, metavar="FILE", help=f"where answers are kept (default: {ANSWERS} by --output)"
    )
    options.add_argument(
        "--kept-only", action="store_true", default=None, help="ask nothing: what has no answer yet is unanswered"
    )
    options.add_argument("--dry-run", action="store_true", default=None, help="show two prompts and an estimate, end")


_DEFAULTS: Mapping[str, Any] = {
    "rubric": "helpful",
    "concurrency": 16,
    "timeout": 120.0,
    "max_tokens": 1024,
    "kept_only": False,
    "dry_run": False,
}
_OPTIONS = ("model", "base_url", "price_per_million", "answers", *_RANGES, *_DEFAULTS)


def check_options(given: argparse.Namespace) -> None:
    """Fills in the defaults. ConfigError names the option that is missing, out of range or of another judge."""
    if given.judge != "llm":
        for name in _OPTIONS:
            if getattr(given, name) is not None:
                raise ConfigError(f"{_option(name)} goes with --judge llm")
        return
    for name, value in _DEFAULTS.items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    for name, bounds in _RANGES.items():
        value = getattr(given, name)
        if value is not None and value not in bounds:
            raise ConfigError(f"{_option(name)} {value} must be {bounds}")
    for value in given.price_per_million or ():
        if value not in _PRICE:
            raise ConfigError(f"--price-per-million {value} must be {_PRICE}")
    if not (given.model or "").strip():
        raise ConfigError("--judge llm needs --model, the judge's name on its server")
    if not given.model.isprintable():
        raise ConfigError(f"--model {given.model!r} is no name")
    if given.max_cost is not None and not any(given.price_per_million or ()):
        raise ConfigError("--max-cost needs --price-per-million IN OUT")
    if given.answers is None and given.output is None and not given.dry_run:
        raise ConfigError("--judge llm needs --output, or --answers FILE: what is paid for is kept")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def answers_file(given: argparse.Namespace) -> Path:
    if given.answers is not None:
        return given.answers
    return (Path() if given.output is None else given.output.parent) / ANSWERS


def _check_writable(output: Path) -> None:
    """Before anything is paid for."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output.parent).close()
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written: {error.strerror}") from None


def judge_by_llm(given: argparse.Namespace, comparisons: Mapping[str, Sequence[Comparison]]) -> list[Judgment]:
    """Opponent by opponent, row by row. CommandEnded, ConfigError: as `judge_comparisons`."""
    from megatron_gil.evaluation.llm_judge.judge import LlmSettings, judge_comparisons

    rubric = read_rubric(given.rubric)
    if given.output is not None:
        _check_writable(given.output)
    rows = [(opponent, comparison) for opponent, found in comparisons.items() for comparison in found]
    settings = LlmSettings(
        model=given.model,
        rubric=rubric,
        answers=answers_file(given),
        base_url=given.base_url,
        concurrency=given.concurrency,
        requests_per_minute=given.requests_per_minute,
        timeout_s=given.timeout,
        max_tokens=given.max_tokens,
        price=_price(given),
        max_cost=given.max_cost,
        kept_only=given.kept_only,
    )
    judge = f"{given.model}, {rubric.name}"
    rulings = judge_comparisons([comparison for _, comparison in rows], settings)
    return [
        Judgment(
            task=given.task,
            judge=judge,
            rater=judge,
            policy=given.ours.stem,
            opponent=opponent,
            prompt=comparison.prompt,
            ours=comparison.ours,
            theirs=comparison.theirs,
            outcome=ruling.outcome,
            ours_first=ruling.ours_first,
            theirs_first=ruling.theirs_first,
        )
        for (opponent, comparison), ruling in zip(rows, rulings, strict=True)
    ]


def _price(given: argparse.Namespace) -> Price | None:
    return (
        None
        if given.price_per_million is None
        else Price(tokens_in=given.price_per_million[0], tokens_out=given.price_per_million[1])
    )


def dry_run(given: argparse.Namespace, comparisons: Mapping[str, Sequence[Comparison]]) -> int:
    """Print what would be sent, how much of it, and what it may cost; no key is needed, nothing is sent or written."""
    rows = [comparison for found in comparisons.values() for comparison in found]
    plan = plan_questions(rows, given.model, read_rubric(given.rubric))
    open_questions = _not_in_store(plan, given)
    pairs = list(plan.keys.values())[:2]
    for number, pair in enumerate(pairs, start=1):
        _show(f"Prompt {number} of {len(plan.questions):,}", plan.questions[pair[number - 1]])
    print(_counts(plan, len(open_questions), given))
    if open_questions:
        print(_estimate(open_questions, given))
    return 0


def _not_in_store(plan: Plan, given: argparse.Namespace) -> list[Question]:
    from megatron_gil.evaluation.llm_judge.client import server_url

    path, base_url = answers_file(given), server_url(given.base_url)
    if not path.exists():
        return list(plan.questions.values())
    store = AnswerStore(path, read_only=True)
    try:
        return [
            question
            for key, question in plan.questions.items()
            if standing_of(store.answers(key), base_url=base_url, max_tokens=given.max_tokens).state == "open"
        ]
    finally:
        store.close()


def _show(title: str, question: Question) -> None:
    for role, text in (("system", question.instruction), ("user", question.message)):
        print(f"---- {title}, {role} ----")
        print("".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text))
    print("----\n")


def _counts(plan: Plan, num_open: int, given: argparse.Namespace) -> str:
    return (
        f"{plan.num_rows:,} comparisons: {plan.num_identical:,} identical, which are ties, {plan.num_repeated:,} "
        f"repeated, {len(plan.keys):,} to judge in both orders.\n{len(plan.questions) - num_open:,} verdicts are in "
        f"{answers_file(given)}, {num_open:,} requests would be sent to {given.model}."
    )


def _estimate(questions: Sequence[Question], given: argparse.Namespace) -> str:
    tokens_in = sum(question.num_bytes for question in questions) // BYTES_A_TOKEN
    tokens_out = TOKENS_AN_ANSWER * len(questions)
    text = f"An estimate: {tokens_in:,} tokens in, {tokens_out:,} out"
    price = _price(given)
    if price is not None:
        most = price.of(sum(map(most_tokens_in, questions)), given.max_tokens * len(questions))
        text += f", price {price.of(tokens_in, tokens_out):.2f}; no more than {most:.2f} if none is asked again"
    return (
        f"{text}.\nIt takes a token for {BYTES_A_TOKEN} bytes and an answer for {TOKENS_AN_ANSWER} tokens; a model "
        "that thinks before it answers writes many more."
    )
