"""A large language model as the judge, behind any OpenAI-compatible server (the `openai` package)."""

from __future__ import annotations

import re
from typing import Any

from megatron_gil.config import ConfigError
from megatron_gil.evaluation.judge import SwappedOrders, Verdict
from megatron_gil.evaluation.rubrics import Rubric

_FORM = (
    "You are an impartial judge. {question} The order in which the two are shown means nothing. Give your reasons in "
    "at most three sentences, then end with one line that is exactly one of:\nVERDICT: A\nVERDICT: B\nVERDICT: TIE"
)
_SHOWN = "[The request]\n{prompt}\n\n[Response A]\n{first}\n\n[Response B]\n{second}"
_VERDICT = re.compile(r"VERDICT: (A|B|TIE)\.?")
_MEANING: dict[str, Verdict] = {"A": "win", "B": "lose", "TIE": "tie"}


def read_verdict(answer: str) -> Verdict | None:
    """The verdict for response A in the last line of a judge's answer; None where that line has another form."""
    lines = answer.strip().splitlines()
    found = _VERDICT.fullmatch(lines[-1].strip(" *`\t")) if lines else None
    return _MEANING[found[1]] if found else None


class LlmJudge(SwappedOrders):
    """A language model as the judge, asked in both orders; where the two verdicts disagree it is a tie."""

    def __init__(
        self,
        *,
        model: str,
        rubric: Rubric,
        base_url: str | None = None,
        api_key: str | None = None,
        max_retries: int = 5,
        timeout_s: float = 120.0,
        attempts: int = 3,
    ) -> None:
        """max_retries: how often a request is repeated, with growing pauses, while the server is busy or gone.
        attempts: how many answers are asked for until one ends in a verdict. api_key: None reads OPENAI_API_KEY, as
        the package does."""
        super().__init__(f"{model}, {rubric.name}", self._ask_once)
        self._model, self._attempts = model, attempts
        self._instruction = _FORM.format(question=rubric.question)
        self._client = _open_client(base_url, api_key, max_retries, timeout_s)

    def _ask_once(self, prompt: str, first: str, second: str) -> Verdict:
        answer = ""
        for attempt in range(self._attempts):
            # at temperature 0 a second request would get the same malformed answer
            answer = self._complete(prompt, first, second, temperature=0.0 if attempt == 0 else 0.7)
            verdict = read_verdict(answer)
            if verdict is not None:
                return verdict
        raise ConfigError(
            f"judge model {self._model}: {self._attempts} answers without a last line VERDICT: A, B or TIE "
            f"(the last one ends {answer.strip()[-80:]!r}); take a model that follows instructions"
        )

    def _complete(self, prompt: str, first: str, second: str, *, temperature: float) -> str:
        from openai import OpenAIError

        messages: list[Any] = [
            {"role": "system", "content": self._instruction},
            {
                "role": "user",
                "content": _SHOWN.format(prompt=prompt.strip(), first=first.strip(), second=second.strip()),
            },
        ]
        try:
            response = self._client.chat.completions.create(
                model=self._model, messages=messages, temperature=temperature
            )
        except OpenAIError as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"judge model {self._model} at {self._client.base_url}: {reason}") from None
        return response.choices[0].message.content or ""


def _open_client(base_url: str | None, api_key: str | None, max_retries: int, timeout_s: float) -> Any:
    try:
        from openai import OpenAI, OpenAIError
    except ImportError:
        raise ConfigError("the LLM judge needs the openai package: pip install openai") from None
    try:
        return OpenAI(base_url=base_url, api_key=api_key, max_retries=max_retries, timeout=timeout_s)
    except OpenAIError:
        if base_url is None:
            raise ConfigError("the LLM judge has no API key: set OPENAI_API_KEY, or give --base-url") from None
        # a server of the user's own needs no key, but the package asks for one
        return OpenAI(base_url=base_url, api_key="none", max_retries=max_retries, timeout=timeout_s)
