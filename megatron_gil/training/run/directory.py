"""The run directory: taken or refused, never overwritten, and by one process at a time.

config.yaml holds the settings in force. What a resume changed stands in config_history.jsonl, a row for each key:
{"iteration", "key", "old", "new", "time", "commit"}.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import megatron_gil
from megatron_gil import __version__
from megatron_gil.config import IS_PATH, ConfigError, TrainConfig
from megatron_gil.config.files import dump_config, flatten, read_yaml, settings_of
from megatron_gil.paths import expand_user, write_whole
from megatron_gil.training.run.lock import FileLock

CONFIG_FILE = "config.yaml"
HISTORY_FILE = "config_history.jsonl"
LOCK_FILE = "run.lock"
COMMAND_SECTIONS = {"train", "reward", "dpo", "ppo"}
"""By these a config tells which command it is of."""

WEIGHTS = "the weights come from the checkpoint"
ROWS = "which rows an iteration gets follows from it"
UPDATES = "the updates so far are counted by it"
HEADS = "the checkpoint's models and state are of that kind"
FIXED = {
    "run.seed": ROWS,
    "models.policy": WEIGHTS,
    "models.ref_policy": "the reference would be another one",
    "models.reward_model": "scores so far are another model's",
    "models.critic": WEIGHTS,
    "models.dtype": HEADS,
    "models.reward_tokenizer": "scores so far are another model's",
    "reward.function": "scores so far are another function's",
    "data.train": ROWS,
    "data.pretrain": ROWS,
    "data.tokenizer": "the model was trained on its ids",
    "batch.global_size": ROWS,
    "ppo.prompts": ROWS,
    "ppo.responses_per_prompt": ROWS,
    "ppo.epochs": UPDATES,
    "ppo.advantages": HEADS,
    "gil.num_groups": HEADS,
    "gil.groups": HEADS,
    "gil.classifier": HEADS,
    "gil.init_scale": "the classifier has started",
}
"""Keys that cannot change once there is a checkpoint: the change would go unheeded, or the run be no longer a pure
function of (seed, position). All others take effect from the iteration on where the run is resumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A key whose value is not what the run had before."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new}"


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """A run directory that this process holds."""

    path: Path
    config: TrainConfig
    changes: list[Change]

    def record(self, iteration: int) -> None:
        """Write down what changes from iteration number `iteration` on. Raises OSError."""
        if not self.changes:
            return
        rows = [
            {**row, "iteration": min(row["iteration"], iteration)}  # later ones are run again, with what holds now
            for row in read_history(self.path)
        ]
        now, commit = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()), git_commit()
        for change in self.changes:
            row = {"iteration": iteration, "key": change.key, "old": change.old, "new": change.new}
            if not any(row.items() <= earlier.items() for earlier in rows[-len(self.changes) :]):  # killed in between
                rows.append({**row, "time": now, "commit": commit})
        write_whole(self.path / HISTORY_FILE, "".join(json.dumps(row) + "\n" for row in rows))
        write_whole(self.path / CONFIG_FILE, _config_text(self.config))


def take_directory(
    config: TrainConfig, *, stopping: Callable[[], bool], patience_s: float, at_end: ExitStack
) -> RunDirectory | None:
    """The run directory, held until `at_end`. Rank 0 alone calls this.

    A new directory gets config.yaml. One that holds a run is resumed, or refused with run.resume=false or a change that
    cannot be; one that holds something else, or that another process holds, is refused. None: a stop was asked for
    while it was not known whether the process that holds it lives.
    """
    directory = Path(config.run.dir)
    what = f"run.dir={directory}"
    if not (directory / CONFIG_FILE).exists() and directory.is_dir():
        _refuse_foreign(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock.take(directory / LOCK_FILE, what, stopping=stopping, patience_s=patience_s)
    except OSError as error:
        raise ConfigError(f"{what} cannot be made: {error.strerror}") from None
    if lock is None:
        return None
    at_end.callback(lock.release)
    return RunDirectory(directory, config, _begin_or_compare(directory, config))


def _begin_or_compare(directory: Path, config: TrainConfig) -> list[Change]:
    if (directory / CONFIG_FILE).exists():
        if not config.run.resume:
            raise ConfigError(f"run.dir={directory} holds a run already; choose another, or run.resume=true to go on")
        return _find_changes(directory, config)
    try:
        (directory / "checkpoints").mkdir(exist_ok=True)
        write_whole(directory / CONFIG_FILE, _config_text(config))
    except OSError as error:
        raise ConfigError(f"run.dir={directory} cannot be made: {error.strerror}") from None
    return []


def _refuse_foreign(directory: Path) -> None:
    """What a start that was killed before it wrote config.yaml leaves is no other's."""
    names = [path.name for path in directory.iterdir() if not path.name.startswith(LOCK_FILE)]
    if set(names) - {f".{CONFIG_FILE}.tmp", "checkpoints"} or any(directory.glob("checkpoints/*")):
        raise ConfigError(f"run.dir={directory} is not empty and holds no {CONFIG_FILE}; choose another directory")


def _find_changes(directory: Path, config: TrainConfig) -> list[Change]:
    """How the config differs from the one in force. ConfigError for a change that cannot be."""
    read_history(directory)  # a damaged one is said before anything is built
    record: Any = OmegaConf.to_container(read_yaml(directory / CONFIG_FILE))
    theirs, ours = _command_sections(record), _command_sections(asdict(config))
    if theirs and theirs != ours:
        raise ConfigError(
            f"run.dir={directory} holds a run of another command, with {', '.join(sorted(theirs))} settings"
        )
    before, after = flatten(record), settings_of(config)
    defaults = settings_of(type(config))  # for keys newer than the run
    changes = [Change(key=k, old=before.get(k, defaults[k]), new=v) for k, v in after.items()]
    changes = [change for change in changes if not _is_same(config, change)]
    if any((directory / "checkpoints").glob("iter_*")):
        for change in changes:
            if change.key in FIXED and change.key in before:
                old, new = _shown(change.old), _shown(change.new)
                raise ConfigError(
                    f"run.dir={directory} holds a run with {change.key}={old}, not {new}; that cannot change "
                    f"on a resume ({FIXED[change.key]}): set it back, or choose another run.dir"
                )
    return changes


def _command_sections(sections: Iterable[str]) -> set[str]:
    found = COMMAND_SECTIONS & set(sections)
    return {"ppo"} if "ppo" in found else found  # which has a section reward of its own


def _is_same(config: TrainConfig, change: Change) -> bool:
    """Also another spelling of a path."""
    if change.old == change.new:
        return True
    section, _, name = change.key.partition(".")
    metadata = type(getattr(config, section)).__dataclass_fields__[name].metadata
    if IS_PATH not in metadata or not isinstance(change.old, str) or not isinstance(change.new, str):
        return False
    return os.path.realpath(os.path.expanduser(change.old)) == os.path.realpath(expand_user(change.new))


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def read_history(directory: Path) -> list[dict[str, Any]]:
    """The rows of config_history.jsonl; none where no resume has changed anything. ConfigError for a damaged one."""
    path = directory / HISTORY_FILE
    if not path.exists():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        if all(isinstance(row["iteration"], int) and isinstance(row["key"], str) for row in rows):
            return rows
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ConfigError(f"{path}: damaged; remove it to go on without a record of what changed")


def _config_text(config: TrainConfig) -> str:
    return f"# megatron_gil {__version__}, commit {git_commit()}\n{dump_config(config)}"


def git_commit() -> str:
    """The commit of the code that runs, with `+changes` if the work tree has any; `unknown` where this package is not
    in a checkout of this project: it may lie in an environment inside another project, whose commit says nothing."""
    package = Path(megatron_gil.__file__).resolve().parent
    ours = [f"{package.name}/__init__.py", "setup.py"]
    try:
        top = Path(_git(package, "rev-parse", "--show-toplevel"))
        _git(top, "ls-files", "--error-unmatch", *ours)
        if package != top / package.name or f'name="{package.name}"' not in (top / "setup.py").read_text("utf-8"):
            return "unknown"
        return _git(top, "rev-parse", "HEAD") + ("+changes" if _git(top, "status", "--porcelain") else "")
    except (OSError, ValueError, subprocess.CalledProcessError):
        return "unknown"


def _git(directory: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=directory, capture_output=True, text=True, check=True)
    return done.stdout.strip()
