"""What requests cost, and a limit that is kept before it is passed."""

from __future__ import annotations

import asyncio
import unicodedata
from dataclasses import dataclass

from megatron_gil.evaluation.llm_judge.prompts import Question

TEMPLATE_TOKENS = 64
"""More than any chat template puts around two messages."""
BYTES_A_TOKEN = 4
"""Of English text, roughly; for estimates alone."""
TOKENS_AN_ANSWER = 100
"""Three sentences and the verdict, roughly; for estimates alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """In any currency, for a million tokens."""

    tokens_in: float
    tokens_out: float

    def of(self, tokens_in: float, tokens_out: float) -> float:
        return (tokens_in * self.tokens_in + tokens_out * self.tokens_out) / 1e6


def most_tokens_in(question: Question) -> int:
    """Tokens are a byte or longer, also of text that a tokenizer first brings into its normal form."""
    text = question.instruction + question.message
    normal = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return max(question.num_bytes, len(normal.encode())) + TEMPLATE_TOKENS


class LimitReached(Exception):
    """The next request might pass the limit."""


class Budget:
    """Each request reserves the most that it can cost before it is sent, and is settled at what it did cost."""

    def __init__(self, price: Price | None = None, limit: float | None = None) -> None:
        assert limit is None or price is not None
        self.price, self.limit = price, limit
        self.spent = 0.0
        self._reserved, self._num_reserved = 0.0, 0
        self._excess = 1.0  # a server that counts more tokens than was thought possible raises all bounds
        self._settled = asyncio.Condition()

    async def reserve(self, tokens_in: int, tokens_out: int) -> float:
        """The sum put aside; waits for requests in flight where it does not fit. LimitReached where none is left."""
        if self.price is None or self.limit is None:
            return 0.0
        async with self._settled:
            while True:
                bound = self.price.of(tokens_in, tokens_out) * self._excess
                if self.spent + self._reserved + bound <= self.limit:
                    break
                if not self._num_reserved:
                    raise LimitReached(
                        f"{self.spent:.4f} is spent, and the next request may cost {bound:.4f}: --max-cost "
                        f"{self.limit:g} would be passed; raise it"
                    )
                await self._settled.wait()
            self._reserved, self._num_reserved = self._reserved + bound, self._num_reserved + 1
            return bound

    async def settle(self, reserved: float, bound: tuple[int, int], used: tuple[int, int]) -> None:
        """bound, used: tokens in and out, thought possible and counted by the server."""
        if self.price is None:
            return
        cost, most = self.price.of(*used), self.price.of(*bound)
        self.spent += cost
        if self.limit is None:
            return
        async with self._settled:
            self._reserved, self._num_reserved = self._reserved - reserved, self._num_reserved - 1
            if most and cost > most:
                self._excess = max(self._excess, cost / most)
            self._settled.notify_all()
