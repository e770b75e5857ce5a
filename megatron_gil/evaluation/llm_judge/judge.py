"""A language model as the judge of many comparisons: asked in both orders, with every answer kept."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from megatron_gil.console import CommandEnded, Interrupted
from megatron_gil.evaluation.comparisons import Comparison
from megatron_gil.evaluation.llm_judge.answers import Answer, AnswerStore, other_servers
from megatron_gil.evaluation.llm_judge.asking import Asking
from megatron_gil.evaluation.llm_judge.client import ChatClient, server_url
from megatron_gil.evaluation.llm_judge.cost import Budget, Price
from megatron_gil.evaluation.llm_judge.pace import Pace, Patience
from megatron_gil.evaluation.llm_judge.plan import Plan, plan_questions
from megatron_gil.evaluation.llm_judge.progress import Display, Tally, listed, many
from megatron_gil.evaluation.llm_judge.prompts import Question
from megatron_gil.evaluation.llm_judge.standing import IDENTICAL, Ruling, Standing, ruling_of, standing_of
from megatron_gil.evaluation.rubrics import Rubric

SAVED = 75
"""Exit code after a signal: the same command goes on from what is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmSettings:
    model: str
    rubric: Rubric
    answers: Path
    """Where every answer is kept."""
    base_url: str | None = None
    """None: that of OPENAI_BASE_URL, or OpenAI's."""
    concurrency: int = 16
    requests_per_minute: float | None = None
    timeout_s: float = 120.0
    """For a whole request."""
    max_tokens: int = 1024
    price: Price | None = None
    max_cost: float | None = None
    patience: Patience = Patience()
    kept_only: bool = False
    """Ask nothing: what has no answer yet is unanswered."""


def judge_comparisons(comparisons: Sequence[Comparison], settings: LlmSettings) -> list[Ruling]:
    """A ruling for each, in their order. What the store of answers holds is not asked again.

    Progress goes to standard error. ConfigError before the first request where the store, the key or the URL is wrong;
    CommandEnded where the server, the user or the limit on cost ends it. All answers that came until then are kept.
    """
    plan = plan_questions(comparisons, settings.model, settings.rubric)
    budget = Budget(settings.price, settings.max_cost)
    pace = Pace(settings.concurrency, settings.patience, settings.requests_per_minute)
    tally = Tally(plan.keys)
    display = Display(tally, budget, pace, Console(stderr=True))
    try:
        _ask_what_is_open(plan, settings, tally, display, pace, budget)
    except Interrupted as stopped:
        reason = f"stopped by {signal.Signals(stopped.number).name}; {_kept(tally, settings)}"
        raise CommandEnded(reason, SAVED) from None
    except CommandEnded as ended:
        raise CommandEnded(f"{ended}; {_kept(tally, settings)}", ended.exit_code) from None
    for line in tally.why():
        display.say(f"  {line}")
    return [
        IDENTICAL if comparison.is_identical else ruling_of(*(tally.standings[key] for key in plan.keys[comparison]))
        for comparison in comparisons
    ]


def _ask_what_is_open(
    plan: Plan,
    settings: LlmSettings,
    tally: Tally,
    display: Display,
    pace: Pace,
    budget: Budget,
) -> None:
    base_url = server_url(settings.base_url)
    store = AnswerStore(settings.answers)
    try:
        known = {key: answers for key in plan.questions if (answers := store.answers(key))}
        open_questions: list[tuple[Question, list[Answer]]] = []
        for key, question in plan.questions.items():
            standing = standing_of(known.get(key, []), base_url=base_url, max_tokens=settings.max_tokens)
            if standing.state == "open" and settings.kept_only:
                tally.settle(key, Standing(state="unanswered", reason="not asked: --kept-only"))
            elif standing.state == "open":
                open_questions.append((question, known.get(key, [])))
            else:
                tally.settle(key, standing)
        display.say(_what_is_to_do(plan, len(open_questions), settings, base_url))
        if servers := other_servers((a for answers in known.values() for a in answers), base_url):
            display.say(f"answers of {settings.model} in {store.path} came from {listed(servers)}, and are used")
        tally.begin()
        if not open_questions:
            return display.say(tally.line(budget))
        asking = Asking(
            open_questions,
            client=ChatClient(model=settings.model, base_url=base_url, timeout_s=settings.timeout_s, say=display.say),
            store=store,
            rubric_name=settings.rubric.name,
            max_tokens=settings.max_tokens,
            concurrency=settings.concurrency,
            pace=pace,
            patience=settings.patience,
            budget=budget,
            tally=tally,
        )
        try:
            asyncio.run(_until_a_signal(asking.run(display)))
        finally:
            display.say(tally.line(budget))
        if not tally.has_answer():
            (_, why), _ = tally.reasons.most_common(1)[0]
            raise CommandEnded(f"judge model {settings.model} at {base_url}: no answer at all: {why}", 1)
    finally:
        store.close()


async def _until_a_signal(work: Coroutine[None, None, None]) -> None:
    """CommandEnded after the first one, once all that came is on its way to the disk; a second ends the process."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    came: list[int] = []

    def stop(number: int) -> None:
        came.append(number)
        if len(came) > 1:
            os._exit(128 + number)
        task.cancel()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in numbers}
    heard = [n for n in numbers if before[n] is not signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():
        heard = []  # only the main thread has handlers
    for number in heard:
        loop.add_signal_handler(number, stop, number)
    try:
        await work
    except asyncio.CancelledError:
        if not came:
            raise
        raise CommandEnded(f"stopped by {signal.Signals(came[0]).name}", SAVED) from None
    finally:
        for number in heard:
            loop.remove_signal_handler(number)
            signal.signal(number, before[number])


def _what_is_to_do(plan: Plan, num_open: int, settings: LlmSettings, base_url: str) -> str:
    left_out = [
        *([f"{plan.num_identical:,} identical, which are ties"] if plan.num_identical else []),
        *([f"{plan.num_repeated:,} repeated"] if plan.num_repeated else []),
    ]
    apart = f" ({', '.join(left_out)})" if left_out else ""
    num_known = len(plan.questions) - num_open
    return (
        f"{many(plan.num_rows, 'comparison')}{apart}, {len(plan.keys):,} to judge in both orders; "
        f"{many(num_known, 'verdict')} in {settings.answers}, {num_open:,} to ask of {settings.model} at {base_url}"
    )


def _kept(tally: Tally, settings: LlmSettings) -> str:
    num = sum(standing.state != "unanswered" for standing in tally.standings.values())
    if not num:
        return "no answer had come"
    return f"{many(num, 'answer')} kept in {settings.answers}; the same command goes on from there"
