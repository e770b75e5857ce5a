"""Which runs made a model: from its directory in a checkpoint back to the weights that the first run started from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_gil.config import ConfigError
from megatron_gil.data.hub import HubName
from megatron_gil.evaluation.report.runs import Run, read_run

START_KEYS: Mapping[str, tuple[str, ...]] = {
    "policy": ("models.policy",),
    "reward_model": ("models.reward_model",),
    "critic": ("models.critic", "models.reward_model", "models.policy"),
}
"""By the name of a model's directory: the keys that name what a run started it from, the first that is set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A run, up to the checkpoint that was taken of it."""

    run: Run
    iteration: int
    """How many it had done."""
    started_from: str
    """The directory, or the name on the Hugging Face Hub, whose weights it began with."""

    @property
    def command(self) -> str:
        """By the sections of its config, as the run directory tells runs apart."""
        return next((name for name in ("ppo", "dpo", "reward") if self._has(name)), "sft")

    def _has(self, section: str) -> bool:
        return any(key.startswith(f"{section}.") for key in self.run.config)


def trace(model: Path, note: Callable[[str], None]) -> list[Stage]:
    """The runs that made the model, the last one first; empty for a directory that lies in no checkpoint of a run.

    note: called with a line where a run's files cannot be read; what came before it is then not known either.
    """
    stages: list[Stage] = []
    seen: set[Path] = set()
    while (model := model.resolve()) not in seen:
        seen.add(model)
        checkpoint, directory = model.parent, model.parent.parent.parent
        if not (re.fullmatch(r"iter_\d+", checkpoint.name) and (directory / "config.yaml").is_file()):
            break
        try:
            run = read_run(directory)
        except ConfigError as error:
            note(f"{error}; the model card says nothing of this run")
            break
        iteration = int(checkpoint.name.removeprefix("iter_"))
        keys = START_KEYS.get(model.name, START_KEYS["policy"])
        started_from = next((str(run.config[key]) for key in keys if run.config.get(key)), "")
        metrics = [row for row in run.metrics if row["iteration"] < iteration]
        changes = [row for row in run.changes if row["iteration"] < iteration]
        run = replace(run, metrics=metrics, changes=changes)
        stages.append(Stage(run=run, iteration=iteration, started_from=started_from))
        model = Path(started_from)
    return stages


def hub_name(value: str) -> tuple[str, str] | None:
    """(owner/name, revision or empty) of what a key names, where that is a name on the Hugging Face Hub or lies in the
    cache of one."""
    cached = re.search(r"(?:models|datasets)--([^/]+)--([^/]+)/snapshots/([^/]+)", value)
    if cached:
        return f"{cached[1]}/{cached[2]}", cached[3]
    named = HubName.parse(value)
    return (named.repo, named.revision) if named is not None and named.revision else None


def preparation(path: Path) -> dict[str, Any] | None:
    """{"source", "inputs"} of `megatron-gil prepare-data` where it wrote this file; None where it did not. An input is
    the name of a file, or OWNER/NAME on the Hub."""
    try:
        card = json.loads((path.parent.parent / "card.json").read_text(encoding="utf-8"))
        return {"source": str(card["source"]), "inputs": [str(name) for name in card["inputs"]]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
