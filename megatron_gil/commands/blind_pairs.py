"""`megatron-gil blind-pairs`: preferences as two files of responses, to see how far a judge agrees with them.

    megatron-gil blind-pairs data/hh/eval/preferences.jsonl --output judges/hh
    megatron-gil evaluate judges/hh/a.jsonl judges/hh/b.jsonl --judge llm --model NAME --output judges/hh/llm.json
    megatron-gil win-rates judges/hh/*.judgments.jsonl

A coin that depends on the row's texts alone puts the preferred response into a.jsonl or b.jsonl; which one it was
stands in recorded.judgments.jsonl, as the verdict of a judge called "recorded". Exit code 2: the input is wrong, one
line on stderr says how.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from megatron_gil.config import ConfigError
from megatron_gil.evaluation.comparisons import Judgment, judgment_rows
from megatron_gil.jsonl import iter_jsonl
from megatron_gil.paths import expand_user, write_new


def blind_pairs(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="megatron-gil blind-pairs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preferences", type=expand_user, metavar="PREFERENCES.jsonl", help="{prompt, chosen, rejected}")
    parser.add_argument("--output", type=expand_user, required=True, metavar="DIR", help="must not hold such files yet")
    parser.add_argument("--task", default="", metavar="NAME", help="of the prompt set, for the tables")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N rows only")
    given = parser.parse_args(arguments)
    if given.limit is not None and given.limit < 1:
        raise ConfigError(f"--limit {given.limit} must be at least 1")
    judgments = read_recorded(given.preferences, task=given.task, limit=given.limit)
    contents = {
        "a.jsonl": [{"prompt": j.prompt, "response": j.ours} for j in judgments],
        "b.jsonl": [{"prompt": j.prompt, "response": j.theirs} for j in judgments],
        "recorded.judgments.jsonl": judgment_rows(judgments),
    }
    _write(given.output, contents)
    first = sum(j.outcome == "win" for j in judgments)
    print(f"{len(judgments)} pairs in {given.output}, the preferred response in a.jsonl for {first} of them")
    return 0


def read_recorded(path: Path, *, task: str = "", limit: int | None = None) -> list[Judgment]:
    """The preferences of a file as the verdicts of a judge; equal responses are a tie. ConfigError names file and
    line."""
    found: list[Judgment] = []
    for number, row in iter_jsonl(path):
        texts = [row.get(field) for field in ("prompt", "chosen", "rejected")] if isinstance(row, dict) else []
        if not (texts and all(isinstance(text, str) for text in texts)):
            raise ConfigError(f'{path}:{number}: not {{"prompt", "chosen", "rejected"}}, three texts')
        prompt, chosen, rejected = map(str, texts)
        is_first = sha256(json.dumps([prompt, *sorted((chosen, rejected))]).encode()).digest()[0] % 2 == 0
        is_first ^= chosen > rejected
        ours, theirs = (chosen, rejected) if is_first else (rejected, chosen)
        found.append(
            Judgment(
                task=task,
                judge="recorded",
                rater="recorded",
                policy="a",
                opponent="b",
                prompt=prompt,
                ours=ours,
                theirs=theirs,
                outcome="tie" if ours.strip() == theirs.strip() else "win" if is_first else "lose",
            )
        )
        if len(found) == limit:
            break
    if not found:
        raise ConfigError(f"{path}: holds no preferences")
    return found


def _write(directory: Path, contents: Mapping[str, Iterable[object]]) -> None:
    for name in contents:
        if (directory / name).exists():
            raise ConfigError(f"{directory / name} exists already; name another --output")
    try:
        write_new(
            {directory / name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in contents.items()}
        )
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be written: {error.strerror}; choose another --output") from None
