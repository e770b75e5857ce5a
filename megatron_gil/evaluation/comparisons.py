"""Pairs of responses to one prompt, and what a judge said of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from megatron_gil.config import ConfigError
from megatron_gil.evaluation.judge import Verdict, is_comparable
from megatron_gil.jsonl import iter_jsonl

Outcome = Literal["win", "tie", "lose", "refused", "unanswered"]
"""A verdict; or the judge would not give one (refused), or no answer of its came (unanswered)."""

Row = Mapping[str, str]
"""{"prompt", "response"} and the row's other fields."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two responses to one prompt. Equal texts make it the same comparison, wherever they come from."""

    prompt: str
    ours: str
    theirs: str

    @property
    def is_identical(self) -> bool:
        """A tie that needs no judge."""
        return self.ours.strip() == self.theirs.strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgment:
    """What one judge, or one rater of several, said of one comparison; a line of a file of judgments."""

    task: str
    """The name of the prompt set."""
    judge: str
    rater: str
    """One of the people, or the judge again."""
    policy: str
    """The name of the file or model that gave our response."""
    opponent: str
    prompt: str
    ours: str
    theirs: str
    outcome: Outcome
    ours_first: Verdict | None = None
    """The verdict with our response in the first place, as seen from ours; None where it was not asked for."""
    theirs_first: Verdict | None = None
    """With their response in the first place, as seen from ours as well."""

    @property
    def comparison(self) -> Comparison:
        return Comparison(prompt=self.prompt, ours=self.ours, theirs=self.theirs)


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


def pair_files(ours: Path, theirs: Sequence[Path]) -> dict[str, list[Comparison]]:
    """`pair_read` of files that are read and checked here."""
    return pair_read({path: read_responses(path) for path in (ours, *theirs)}, ours, theirs)


def pair_read(rows: Mapping[Path, Sequence[Row]], ours: Path, theirs: Sequence[Path]) -> dict[str, list[Comparison]]:
    """Opponent's name -> its comparisons, a row each. rows: of every file.

    Names are the files' without their ending; whole paths where those are not distinct. ConfigError names the files and
    the row where they do not answer the same prompts.
    """
    stems = [path.stem for path in theirs]
    names = stems if len(set(stems)) == len(stems) else [str(path) for path in theirs]
    return {
        name: pair_rows(rows[ours], rows[path], f"{ours} and {path}") for name, path in zip(names, theirs, strict=True)
    }


def pair_rows(ours: Sequence[Row], theirs: Sequence[Row], source: str) -> list[Comparison]:
    """Row i of both must answer the same prompt, else ConfigError."""
    if len(ours) != len(theirs):
        raise ConfigError(
            f"{source}: {len(ours)} responses cannot be paired with {len(theirs)}; generate both from one prompt file"
        )
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True), start=1):
        if mine["prompt"] != other["prompt"]:
            raise ConfigError(
                f"{source}: row {number}: the prompts differ ({mine['prompt'][:40]!r}, {other['prompt'][:40]!r}); "
                "generate both from one prompt file"
            )
    return [
        Comparison(prompt=mine["prompt"], ours=mine["response"], theirs=other["response"])
        for mine, other in zip(ours, theirs, strict=True)
    ]


def judgment_rows(judgments: Iterable[Judgment]) -> list[dict[str, str | None]]:
    """As they stand in a file of judgments, JSON Lines."""
    return [asdict(judgment) for judgment in judgments]


def read_judgments(path: Path) -> list[Judgment]:
    """A file of judgments; ConfigError names file, line and field."""
    verdicts: dict[str, tuple[object, ...]] = {
        "outcome": get_args(Outcome),
        "ours_first": (None, *get_args(Verdict)),
        "theirs_first": (None, *get_args(Verdict)),
    }
    found: list[Judgment] = []
    for number, row in iter_jsonl(path):
        if not isinstance(row, dict):
            raise ConfigError(f"{path}:{number}: not an object; `megatron-gil evaluate` writes judgments")
        for field in ("task", "judge", "rater", "policy", "opponent", "prompt", "ours", "theirs"):
            if not isinstance(row.get(field), str):
                raise ConfigError(f'{path}:{number}: no text "{field}"; `megatron-gil evaluate` writes judgments')
        for field, allowed in verdicts.items():
            if row.get(field) not in allowed:
                raise ConfigError(f'{path}:{number}: "{field}" is {row.get(field)!r}, not one of {allowed}')
        found.append(Judgment(**{field: row.get(field) for field in Judgment.__slots__}))  # type: ignore[arg-type]
    if not found:
        raise ConfigError(f"{path}: holds no judgments")
    return found
