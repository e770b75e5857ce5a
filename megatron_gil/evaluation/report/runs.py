"""Run directories, read for a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_gil.config import ConfigError
from megatron_gil.config.files import flatten, read_yaml
from megatron_gil.jsonl import iter_jsonl

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run left behind."""

    name: str
    metrics: list[Json]
    """One object per iteration. A metric may be absent from some."""
    samples: list[Json]
    config: dict[str, Any]
    """section.key -> value."""
    origin: str
    """Version and commit that wrote it; empty where config.yaml does not say."""
    changes: list[Json]
    """What resumes changed in the config: {"iteration", "key", "old", "new", "time", "commit"}."""

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """(iterations, values) where the metric was written and finite."""
        points = [(row["iteration"], row[metric]) for row in self.metrics if row.get(metric) is not None]
        return [x for x, _ in points], [y for _, y in points]

    def late_mean(self, metric: str) -> float | None:
        """Mean over the last tenth of the iterations that have the metric: the number that pages and tables show of
        it. None where no iteration has it."""
        values = self.series(metric)[1]
        tail = values[-max(1, len(values) // 10) :]
        return sum(tail) / len(tail) if tail else None

    def last(self, metric: str) -> float | None:
        values = self.series(metric)[1]
        return values[-1] if values else None

    def alarms(self) -> dict[str, list[tuple[int, int]]]:
        """name -> the (first, last) iterations of each time that the alarm stood. Alarms that never did are left
        out."""
        found: dict[str, list[tuple[int, int]]] = {}
        for metric in (name for name in self.names() if name.startswith("alarm/")):
            spans: list[tuple[int, int]] = []
            for iteration, value in zip(*self.series(metric), strict=True):
                if value and spans and spans[-1][1] == iteration - 1:
                    spans[-1] = (spans[-1][0], iteration)
                elif value:
                    spans.append((iteration, iteration))
            if spans:
                found[metric.removeprefix("alarm/")] = spans
        return found

    @property
    def responses(self) -> list[Json]:
        """Samples of generated text. (Those of sft, reward and dpo are rows of the data, and not among them.)"""
        return [sample for sample in self.samples if "response" in sample]

    def last_samples(self, events: int) -> list[Json]:
        """Responses of the last iterations that kept some."""
        last = sorted({sample["iteration"] for sample in self.responses})[-events:]
        return [sample for sample in self.responses if sample["iteration"] in last]

    def names(self) -> list[str]:
        """Metrics that have at least one value, in the order they first appear."""
        return list(dict.fromkeys(name for row in self.metrics for name, value in row.items() if value is not None))


def read_run(directory: Path, *, name: str | None = None) -> Run:
    """A run directory, finished or not. A last line that is still being written is left out."""
    metrics_file = directory / "metrics.jsonl"
    if not metrics_file.is_file():
        raise ConfigError(f"{directory}: no metrics.jsonl, so this is no run directory")
    config_file, samples_file = directory / "config.yaml", directory / "samples.jsonl"
    history_file = directory / "config_history.jsonl"
    config, origin = _read_config(config_file) if config_file.is_file() else ({}, "")
    return Run(
        name=name or directory.name,
        metrics=_read_rows(metrics_file, _check_metrics),
        samples=_read_rows(samples_file, _check_sample) if samples_file.is_file() else [],
        config=config,
        origin=origin,
        changes=_read_rows(history_file, _check_change) if history_file.is_file() else [],
    )


def read_runs(directories: Sequence[Path], names: Sequence[str] | None = None) -> list[Run]:
    """Runs under these names. Without names, each gets as many last parts of its path as tell it apart from the
    others."""
    if names is not None:
        return [read_run(directory, name=name) for directory, name in zip(directories, names, strict=True)]
    parts = [directory.resolve().parts for directory in directories]
    depth = 1
    while len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    found = ["/".join(p[-depth:]) for p in parts]
    if len(set(found)) < len(found):
        raise ConfigError(f"the same run directory is named twice: {', '.join(map(str, directories))}")
    return read_runs(directories, found)


def config_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(section.key, value in each run) of the keys whose values are not the same everywhere; run.dir is left out."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key != "run.dir")
    shown = [(key, [str(run.config.get(key, "-")) for run in runs]) for key in keys]
    return [(key, values) for key, values in shown if len(set(values)) > 1]


def _read_config(path: Path) -> tuple[dict[str, Any], str]:
    tree: Any = OmegaConf.to_container(read_yaml(path))
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return flatten(tree), first.lstrip("# ") if first.startswith("#") else ""


def _read_rows(path: Path, check: Callable[[Json], Json]) -> list[Json]:
    """Objects with a whole number "iteration"; a last line that is still being written is left out.

    check: makes of a row what is used; raises ValueError for a row that no run writes.
    """
    rows: list[Json] = []
    for number, found in iter_jsonl(path, growing=True):
        row = _without_surrogates(found)
        try:
            if not isinstance(row, dict) or type(row.get("iteration")) is not int or not 0 <= row["iteration"] < 2**53:
                raise ValueError('has no whole number "iteration"')
            rows.append(check(row))
        except ValueError as error:
            raise ConfigError(f"{path}: line {number} {error}; no run writes such a file") from None
    return rows


def _check_metrics(row: Json) -> Json:
    """The metrics, with None for numbers that are not finite."""
    for name, value in row.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"has the metric {name!r:.60} that is no number")
    return {name: value if _can_be_drawn(value) else None for name, value in row.items()}


def _check_sample(row: Json) -> Json:
    texts = [name for name in ("response", "target", "chosen", "rejected") if name in row] or ["response"]
    for name in ("prompt", *texts):
        _check_text(row, name)
    score, probs = row.get("score"), row.get("group_probs") or []
    if not isinstance(probs, list) or not all(map(_can_be_drawn, probs)):
        raise ValueError('has "group_probs" that are no list of numbers')
    return row if score is None or _can_be_drawn(score) else {**row, "score": None}


def _check_change(row: Json) -> Json:
    _check_text(row, "key")
    return row


def _check_text(row: Json, name: str) -> None:
    if not isinstance(row.get(name), str):
        raise ValueError(f'has no text "{name}"')


def _can_be_drawn(value: object) -> bool:
    """Whether a value is a finite number that an axis has room for."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 <= value <= 1e300


def _without_surrogates(value: Any) -> Any:
    """The text without halves of surrogate pairs: JSON can hold them, UTF-8 cannot."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_without_surrogates(part) for part in value]
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(part) for key, part in value.items()}
    return value
