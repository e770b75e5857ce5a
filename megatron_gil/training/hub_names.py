"""Names on the Hugging Face Hub that a config gives in the place of paths, pinned to a commit.

With its pins the config goes into the run directory, so that a resumed run reads the same files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf

from megatron_gil.config import IS_PATH, AuditConfig, CommandConfig, TrainConfig
from megatron_gil.config.files import flatten, read_yaml
from megatron_gil.data.hub import HubName, Kind, fetch
from megatron_gil.models.uses import model_uses
from megatron_gil.training.run.directory import CONFIG_FILE

Config = TypeVar("Config", bound=CommandConfig)


def pin_names_alone(config: Config) -> Config:
    """The config with a commit in every name, whose files are in the cache: in a process that is alone, as a dry run
    is."""
    return with_pins(config, {key: str(fetch(name, kind, key)) for key, (name, kind) in names_of(config).items()})


def names_of(config: CommandConfig) -> dict[str, tuple[HubName, Kind]]:
    """By key, the names that the command will read; with the commit that an earlier start of the run has pinned."""
    roles = {use.key for use in model_uses(config)}
    data, models = _paths(config.data), _paths(config.models)  # data first: it is small, and soon said what is wrong
    kinds: dict[str, Kind] = {f"data.{f.name}": "tokenizer" if f.name == "tokenizer" else "dataset" for f in data}
    if isinstance(config, AuditConfig):
        kinds |= {f"audit.{f.name}": "dataset" for f in _paths(config.audit)}
    kinds |= {f"models.{f.name}": "model" for f in models if f.name in roles}
    found: dict[str, tuple[HubName, Kind]] = {}
    values = flatten(asdict(config))
    for key, kind in kinds.items():
        name = HubName.parse(values[key]) if values[key] else None
        if name is not None:
            found[key] = name, kind
    before = _recorded(config) if found else {}
    return {key: (_pinned_before(name, before.get(key)), kind) for key, (name, kind) in found.items()}


def _paths(section: Any) -> list[Any]:
    return [f for f in fields(section) if IS_PATH in f.metadata]


def _recorded(config: CommandConfig) -> dict[str, Any]:
    """section.key -> value of the run that run.dir holds."""
    if not isinstance(config, TrainConfig) or not config.run.dir or not Path(config.run.dir, CONFIG_FILE).is_file():
        return {}
    tree: Any = OmegaConf.to_container(read_yaml(Path(config.run.dir, CONFIG_FILE)))
    return flatten(tree)


def _pinned_before(name: HubName, recorded: Any) -> HubName:
    """What a start without a revision was pinned to, where it is the same repository."""
    before = HubName.parse(recorded) if isinstance(recorded, str) else None
    is_same = before is not None and before.repo == name.repo and name.files in ("", before.files)
    return before if before is not None and is_same and not name.revision else name


def with_pins(config: Config, pins: Mapping[str, str]) -> Config:
    """The config with these values of section.key."""
    for key, value in pins.items():
        section, _, name = key.partition(".")
        changed: Any = {section: replace(getattr(config, section), **{name: value})}
        config = replace(config, **changed)
    return config
