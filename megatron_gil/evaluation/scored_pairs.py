"""Preference pairs with a reward model's score of either response, as `megatron-gil score` writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gil.config import ConfigError
from megatron_gil.jsonl import iter_jsonl

LARGEST_SCORE = 3.4028235e38
"""Of float32, in which a reward model answers. Squares and sums of margins then stay within float64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredPair:
    prompt: str
    chosen: str
    rejected: str
    score_chosen: float
    score_rejected: float
    group: str | None = None
    """The known label."""
    source: str = ""
    """The name of its file."""

    @property
    def margin(self) -> float:
        """score_chosen - score_rejected; above 0 where the reward model agrees with the choice."""
        return self.score_chosen - self.score_rejected

    @property
    def is_identical(self) -> bool:
        """No choice at all."""
        return self.chosen.strip() == self.rejected.strip()


def read_scored_pairs(paths: Sequence[Path]) -> list[ScoredPair]:
    """The pairs of all files, in their order; ConfigError names file, line and field.

    A file's name is that without its ending; the whole path where these are not distinct.
    """
    stems = [path.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".scored") for path in paths]
    names = stems if len(set(stems)) == len(stems) else [str(path) for path in paths]
    if twice := next((path for i, path in enumerate(paths) if path in paths[:i]), None):
        raise ConfigError(f"{twice} is given twice")
    return [pair for path, name in zip(paths, names, strict=True) for pair in _read_file(path, name)]


def _read_file(path: Path, name: str) -> list[ScoredPair]:
    pairs = [_read_row(row, f"{path}:{number}", name) for number, row in iter_jsonl(path)]
    if not pairs:
        raise ConfigError(f"{path}: holds no pairs")
    return pairs


def _read_row(row: Any, where: str, name: str) -> ScoredPair:
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: not an object; `megatron-gil score` writes scored pairs")
    if "score" in row and "score_chosen" not in row:
        raise ConfigError(f"{where}: one scored response, not a pair; score a file of {{prompt, chosen, rejected}}")
    for field in ("prompt", "chosen", "rejected"):
        if not isinstance(row.get(field), str):
            raise ConfigError(f'{where}: no text "{field}"; `megatron-gil score` writes scored pairs')
    for field in ("score_chosen", "score_rejected"):
        score = row.get(field)
        if not isinstance(score, int | float) or isinstance(score, bool):
            raise ConfigError(f'{where}: no number "{field}"; write one with `megatron-gil score`')
        if not -LARGEST_SCORE <= score <= LARGEST_SCORE:  # NaN too
            raise ConfigError(f"{where}: {field} is {score:.6g}, which no score can be; score again")
    group = row.get("group")
    if isinstance(group, bool) or not isinstance(group, str | int | None):
        raise ConfigError(f'{where}: "group" must be text or an integer')
    return ScoredPair(
        prompt=row["prompt"],
        chosen=row["chosen"],
        rejected=row["rejected"],
        score_chosen=float(row["score_chosen"]),
        score_rejected=float(row["score_rejected"]),
        group=None if group is None else str(group),
        source=name,
    )
