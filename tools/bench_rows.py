"""Rows to train on: lengths as in chats, or all alike, of random tokens, written for this project and for TRL."""

from __future__ import annotations

import json
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_gil.data.rows.order import RowOrder

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)
PROMPT_TOKENS = (6, 16, 22, 42, 67, 94, 124, 158, 209, 292, 375, 476, 568, 1002)
RESPONSE_TOKENS = (1, 8, 14, 20, 27, 35, 45, 59, 77, 111, 148, 202, 244, 902)
"""Quantiles, at SHARES, of the prompts and responses of Anthropic's HH-RLHF (both base-test files, 4,666 pairs), at
four characters a token, which is what Llama's tokenizers make of English. `python tools/bench_rows.py DIR` prints them
from the two files."""
MAX_TOKENS, MAX_PROMPT_TOKENS = 512, 384
FULL_PROMPT_TOKENS, FULL_RESPONSE_TOKENS = 64, 192
FIRST_WORD = 1
"""Token 0 and the last two, end and padding, are in no row: what is padding can be told from a token alone."""

Lengths = Literal["chat", "full"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRow:
    """Token ids; an end of sequence is not among them."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


def draw_batches(
    num_batches: int, num_rows: int, *, vocab_size: int, lengths: Lengths, scale: float = 1.0
) -> list[list[TextRow]]:
    """Batches of the same distribution of lengths: row i of n has its prompt from the i-th n-th part of it, and so has
    its response, in another order. So every batch is as ragged as the data. scale: of all lengths (trials)."""
    draw = random.Random(1)

    def words(count: float) -> tuple[int, ...]:
        return tuple(draw.randrange(FIRST_WORD, vocab_size - 2) for _ in range(max(1, round(scale * count))))

    def row(prompt: float, chosen: float, rejected: float) -> TextRow:
        return TextRow(prompt=words(prompt), chosen=words(chosen), rejected=words(rejected))

    def shares(quantiles: Sequence[int]) -> list[float]:
        found = [_quantile(quantiles, (i + draw.random()) / num_rows) for i in range(num_rows)]
        return draw.sample(found, num_rows)

    batches = []
    for _ in range(num_batches):
        if lengths == "full":
            batches.append(
                [row(FULL_PROMPT_TOKENS, FULL_RESPONSE_TOKENS - 1, FULL_RESPONSE_TOKENS - 1) for _ in range(num_rows)]
            )
            continue
        prompts = [min(tokens, MAX_PROMPT_TOKENS) for tokens in shares(PROMPT_TOKENS)]
        most = [MAX_TOKENS - tokens - 1 for tokens in prompts]  # with the end of sequence a row is at the limit
        sides = [[min(pair) for pair in zip(shares(RESPONSE_TOKENS), most, strict=True)] for _ in range(2)]
        batches.append([row(*tokens) for tokens in zip(prompts, *sides, strict=True)])
    return batches


def _quantile(quantiles: Sequence[int], share: float) -> float:
    """Between two of them, along a straight line."""
    above = bisect_right(SHARES, share)
    part = (share - SHARES[above - 1]) / (SHARES[above] - SHARES[above - 1])
    return quantiles[above - 1] + part * (quantiles[above] - quantiles[above - 1])


def write_rows(root: Path, batches: Sequence[Sequence[TextRow]], *, seed: int) -> None:
    """demonstrations.jsonl and preferences.jsonl, so ordered that a run of ours with this seed reads batch k in update
    k; and the same in that order, as sequential_*.jsonl."""
    rows = [row for batch in batches for row in batch]
    order = RowOrder(len(rows), seed=seed, batch_size=len(batches[0]))
    ids = [row_id for number in range(len(batches)) for row_id in order.next(number * len(batches[0])).row_ids]
    placed = dict(zip(ids, rows, strict=True))
    shuffled = [placed[number] for number in range(len(rows))]
    for name, found in (("", shuffled), ("sequential_", rows)):
        texts = [{"prompt": _text(row.prompt), "completion": " " + _text(row.chosen)} for row in found]
        _write(root / f"{name}demonstrations.jsonl", texts)
        pairs = [
            {"prompt": _text(r.prompt), "chosen": " " + _text(r.chosen), "rejected": " " + _text(r.rejected)}
            for r in found
        ]
        _write(root / f"{name}preferences.jsonl", pairs)


def _text(ids: Sequence[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def _write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(directory: Path) -> None:
    """Print the quantiles of helpful-base-test.jsonl.gz and harmless-base-test.jsonl.gz."""
    import gzip

    prompts, responses = [], []
    for name in ("helpful", "harmless"):
        with gzip.open(directory / f"{name}-base-test.jsonl.gz", "rt", encoding="utf-8") as lines:
            for pair in map(json.loads, lines):
                ends = {side: text.rfind("\n\nAssistant:") + len("\n\nAssistant:") for side, text in pair.items()}
                prompts.append(ends["chosen"])
                responses += [len(text) - ends[side] for side, text in pair.items()]
    for characters in (prompts, responses):
        ordered = sorted(characters)
        places = (round(share * (len(ordered) - 1)) for share in SHARES)
        print(tuple(max(1, round(ordered[place] / 4)) for place in places))


if __name__ == "__main__":
    import sys

    main(Path(sys.argv[1]))
