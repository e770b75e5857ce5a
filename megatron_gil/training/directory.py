"""The run directory: taken or refused, never overwritten."""

from __future__ import annotations

import subprocess
from pathlib import Path

from omegaconf import OmegaConf

from megatron_gil import __version__
from megatron_gil.config import ConfigError, TrainConfig
from megatron_gil.config_files import dump_config

CONFIG_FILE = "config.yaml"


def take_directory(config: TrainConfig) -> list[str]:
    """How the config differs from the one the run directory was started with. Rank 0 alone calls this.

    A new directory gets config.yaml. One that holds a run is resumed, or refused with run.resume=false; one that holds
    something else is refused.
    """
    directory = Path(config.run.dir)
    record = directory / CONFIG_FILE
    if record.exists():
        if not config.run.resume:
            raise ConfigError(f"run.dir={directory} holds a run already; choose another, or run.resume=true to go on")
        return _differences(record, config)
    if directory.is_dir() and any(directory.iterdir()):
        raise ConfigError(f"run.dir={directory} is not empty and holds no {CONFIG_FILE}; choose another directory")
    try:
        (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
        beside = directory / f".{CONFIG_FILE}.tmp"
        beside.write_text(
            f"# megatron_gil {__version__}, commit {git_commit()}\n{dump_config(config)}", encoding="utf-8"
        )
        beside.replace(record)
    except OSError as error:
        raise ConfigError(f"run.dir={directory} cannot be made: {error.strerror}") from None
    return []


def git_commit() -> str:
    """The commit of the code that runs, with `+changes` if the work tree has any; `unknown` where this package is not
    in a checkout of this project: it may lie in an environment inside another project, whose commit says nothing."""
    package = Path(__file__).resolve().parents[1]
    ours = [f"{package.name}/{Path(__file__).parent.name}/{Path(__file__).name}", "setup.py"]
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


def _differences(record: Path, config: TrainConfig) -> list[str]:
    try:
        before = _flatten(OmegaConf.to_container(OmegaConf.load(record)))
    except Exception as error:  # a YAML error's class depends on the parser
        raise ConfigError(f"{record}: not the config of a run: {' '.join(str(error).split())}") from None
    after = _flatten(OmegaConf.to_container(OmegaConf.create(dump_config(config))))
    keys = sorted(before.keys() | after.keys())
    return [f"{k}: {before.get(k)} -> {after.get(k)}" for k in keys if before.get(k) != after.get(k)]


def _flatten(tree: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    return {key: value for name, part in tree.items() for key, value in _flatten(part, f"{prefix}{name}.").items()}
