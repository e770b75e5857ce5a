"""The questions are asked, so many at a time, until each has a verdict, is refused or stays unanswered."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence

from megatron_gil.console import CommandEnded
from megatron_gil.evaluation.llm_judge.answers import Answer, AnswerStore, Kind, StoreFailed
from megatron_gil.evaluation.llm_judge.client import ChatClient, Completion
from megatron_gil.evaluation.llm_judge.cost import Budget, LimitReached, most_tokens_in
from megatron_gil.evaluation.llm_judge.failures import Failure
from megatron_gil.evaluation.llm_judge.pace import Pace, Patience
from megatron_gil.evaluation.llm_judge.progress import Display, Tally
from megatron_gil.evaluation.llm_judge.prompts import Question, read_verdict
from megatron_gil.evaluation.llm_judge.standing import Standing, standing_of

MOST_IN_A_ROW = 10
"""Questions without an answer, with none answered between, by which a server is taken for dead."""
MOST_REJECTED_IN_A_ROW = 100
"""The same where it says no at once: that costs nothing, and may be for a few texts that are left of an evaluation."""


class Asking:
    """Of one evaluation's open questions. CommandEnded says in one line what ends it before all are settled."""

    def __init__(
        self,
        questions: Sequence[tuple[Question, list[Answer]]],
        *,
        client: ChatClient,
        store: AnswerStore,
        rubric_name: str,
        max_tokens: int,
        concurrency: int,
        pace: Pace,
        patience: Patience,
        budget: Budget,
        tally: Tally,
    ) -> None:
        """questions: with the answers that each has already got."""
        self._questions = deque(questions)
        self._client, self._store, self._rubric_name = client, store, rubric_name
        self._max_tokens, self._concurrency = max_tokens, concurrency
        self._pace, self._patience, self._budget, self._tally = pace, patience, budget, tally
        self._in_a_row, self._most_in_a_row = 0, MOST_IN_A_ROW
        self._begun = 0  # questions that wait for their answer
        self._settled = asyncio.Condition()

    async def run(self, display: Display) -> None:
        # twice as many workers as requests in flight: some wait for the disk, or before they ask again
        workers = [asyncio.create_task(self._work()) for _ in range(2 * self._concurrency)]
        showing = asyncio.create_task(display.run())
        try:
            await asyncio.gather(*workers)
        except LimitReached as reached:
            raise CommandEnded(str(reached), 1) from None
        except StoreFailed as failed:
            raise CommandEnded(str(failed), 1) from None
        finally:
            for task in (showing, *workers):
                task.cancel()
            await asyncio.gather(showing, *workers, return_exceptions=True)
            await self._client.close()

    async def _work(self) -> None:
        while True:
            async with self._settled:
                await self._settled.wait_for(self._may_begin)
                if not self._questions:
                    return
                question, answers = self._questions.popleft()
                self._begun += 1
            await self._settle(question, answers)
            async with self._settled:
                self._begun -= 1
                self._settled.notify_all()

    def _may_begin(self) -> bool:
        """While none is answered, only as many are begun as it takes to tell that the server is dead."""
        return not self._in_a_row or self._in_a_row + self._begun < self._most_in_a_row

    async def _settle(self, question: Question, answers: list[Answer]) -> None:
        while (standing := self._standing(answers)).state == "open":
            result = await self._ask(question, standing)
            if isinstance(result, Failure):
                standing = Standing(state="unanswered", reason=result.reason)
                self._tally.settle(question.key, standing)
                return self._count_in_a_row(result)
            await self._store.keep(result)
            self._in_a_row = 0
            answers.append(result)
        self._tally.settle(question.key, standing)

    def _standing(self, answers: Sequence[Answer]) -> Standing:
        return standing_of(answers, base_url=self._client.base_url, max_tokens=self._max_tokens)

    def _count_in_a_row(self, failure: Failure) -> None:
        self._in_a_row += 1
        self._most_in_a_row = MOST_REJECTED_IN_A_ROW if failure.kind == "rejected" else MOST_IN_A_ROW
        if self._in_a_row >= self._most_in_a_row:
            reason = (
                f"no answer {self._in_a_row} times in a row: {failure.reason}; with --kept-only what has come is enough"
            )
            raise CommandEnded(self._of_server(reason), 1)

    def _of_server(self, reason: str) -> str:
        return f"judge model {self._client.model} at {self._client.base_url}: {reason}"

    async def _ask(self, question: Question, standing: Standing) -> Answer | Failure:
        """One answer, or the last failure after as many requests as patience has."""
        bound = (most_tokens_in(question), standing.max_tokens)
        tries = slow = in_all = 0
        answered = self._pace.answered
        while True:
            result, sent_s, seconds = await self._send(question, standing, bound)
            if isinstance(result, Completion) or result.kind in ("refused", "too_long"):
                self._pace.was_answered()
                self._tally.trouble = ""
                return self._answer(question, standing, result, seconds)
            self._tally.trouble = result.reason
            if result.kind == "user":
                raise CommandEnded(self._of_server(result.reason), 2)
            if result.kind in ("rejected", "max_tokens", "temperature"):
                return result
            if (result.wait_s or 0.0) > self._patience.longest_wait_s:
                reason = f"{result.reason}; it asks for a pause of {result.wait_s:,.0f} s: start again then"
                raise CommandEnded(self._of_server(reason), 1)
            if result.kind == "limited" and self._pace.answered != answered:
                tries, answered = 0, self._pace.answered  # it answers others, so this one's turn comes
            tries, in_all, slow = tries + 1, in_all + 1, slow + (result.kind == "slow")
            patience = self._patience
            if tries >= patience.tries or in_all >= patience.most_tries or slow >= patience.slow_tries:
                return result
            self._tally.retries += 1
            if result.kind in ("limited", "busy") or result.wait_s is not None:
                self._pace.was_busy(sent_s, result.wait_s)
            else:
                await asyncio.sleep(self._patience.pause_s(tries))

    async def _send(
        self, question: Question, standing: Standing, bound: tuple[int, int]
    ) -> tuple[Completion | Failure, float, float]:
        """(what came, when it was sent, how long it took)."""
        reserved = await self._budget.reserve(*bound)
        async with self._pace.turn():
            sent_s = time.monotonic()
            self._tally.requests += 1
            number = self._tally.requests
            self._tally.sent_s[number] = sent_s
            try:
                result = await self._client.complete(
                    question.instruction,
                    question.message,
                    temperature=standing.temperature,
                    max_tokens=standing.max_tokens,
                )
            finally:
                del self._tally.sent_s[number]
        used = _used(result, bound)
        await self._budget.settle(reserved, bound, used)
        if isinstance(result, Completion):
            self._tally.tokens_in += used[0]
            self._tally.tokens_out += used[1]
        return result, sent_s, time.monotonic() - sent_s

    def _answer(self, question: Question, standing: Standing, result: Completion | Failure, seconds: float) -> Answer:
        verdict, text, counted = None, "", (None, None)
        if isinstance(result, Failure):
            kind: Kind = "refused" if result.kind == "refused" else "too_long"
            reason = result.reason
        else:
            verdict = None if result.refusal else read_verdict(result.text)
            kind = "refused" if result.refusal else "verdict" if verdict else "cut" if result.is_cut else "off_form"
            reason = "the model refused, or its server did" if result.refusal else ""
            text, counted = result.text or result.refusal, (result.tokens_in, result.tokens_out)
        return Answer(
            key=question.key,
            model=self._client.model,
            base_url=self._client.base_url,
            rubric=self._rubric_name,
            instruction=question.instruction,
            prompt=question.prompt,
            first=question.first,
            second=question.second,
            temperature=standing.temperature,
            max_tokens=standing.max_tokens,
            kind=kind,
            verdict=verdict,
            text=text,
            reason=reason,
            tokens_in=counted[0],
            tokens_out=counted[1],
            seconds=round(seconds, 3),
            time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )


def _used(result: Completion | Failure, bound: tuple[int, int]) -> tuple[int, int]:
    """Tokens in and out that are paid for: the most possible where the server does not say."""
    if isinstance(result, Failure):
        return bound if result.may_be_billed else (0, 0)
    tokens_in = bound[0] if result.tokens_in is None else result.tokens_in
    return tokens_in, bound[1] if result.tokens_out is None else result.tokens_out
