"""From YAML files and `section.key=value` overrides to a config, and back; every mistake is one line."""

from __future__ import annotations

import difflib
import io
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from megatron_gil.config import IS_PATH, CommandConfig, ConfigError, require
from megatron_gil.config.ranges import refusal
from megatron_gil.paths import expand_user

Config = TypeVar("Config", bound=CommandConfig)

LARGEST_FILE = 1 << 20
"""Bytes of a YAML file. The parser takes a minute for 50 MB."""


def load_config(cls: type[Config], path: Path | None, overrides: Sequence[str]) -> Config:
    """The config of a command from a YAML file (which may name a `base:` file, relative to itself) and overrides.

    Raises ConfigError, in one line, for a file that cannot be read, a wrong key (with the nearest right one), a wrong
    type or value.
    """
    tree = OmegaConf.structured(cls)
    OmegaConf.set_readonly(tree, False)
    layers = [*_read_with_bases(path, []), *(_read_override(text) for text in overrides)]
    source = "command line"
    try:
        for source, layer in layers:
            _check_keys(cls, layer, prefix="", source=source)
            tree = OmegaConf.merge(tree, layer)
        _expand_paths(cls, tree)
        config: Any = OmegaConf.to_object(tree)
    except MissingMandatoryValue as error:
        raise ConfigError(
            f"{path or 'command line'}: {error.full_key} is not set; give it in the file or as {error.full_key}=VALUE"
        ) from None
    except OmegaConfBaseException as error:
        reason = str(error.msg or error).splitlines()[0]
        raise ConfigError(f"{source}: {error.full_key}: {reason}") from None
    except ConfigError:
        raise
    except ValueError as error:  # an integer of thousands of digits, where it is no number
        raise ConfigError(f"{source:.200}: {str(error).splitlines()[0]}") from None
    assert isinstance(config, cls)
    return config


def _read_override(text: str) -> tuple[str, Any]:
    key, separator, _ = text.partition("=")
    require(bool(separator and key.strip()), f"{text!r} is not an override; write section.key=value")
    try:
        return f"override {text}", OmegaConf.from_dotlist([text])
    except Exception as error:  # OmegaConf hands on whatever its YAML and grammar parsers raise
        raise ConfigError(f"override {text}: {str(error).splitlines()[0]}") from None


def _read_with_bases(path: Path | None, seen: list[Path]) -> list[tuple[str, Any]]:
    if path is None:
        return []
    require(path.resolve() not in seen, f"{path}: base files form a circle: {' -> '.join(map(str, [*seen, path]))}")
    layer: Any = read_yaml(path)
    base = layer.pop("base", None)
    below = _read_with_bases(path.parent / _expanded(base), [*seen, path.resolve()]) if base is not None else []
    return [*below, (str(path), layer)]


def _expand_paths(cls: type, tree: Any) -> None:
    """Every path of a config that begins with ~."""
    for f in fields(cls):
        if is_dataclass(f.default_factory):
            _expand_paths(f.default_factory, tree[f.name])  # type: ignore[arg-type]
        elif IS_PATH in f.metadata and str(value := tree._get_node(f.name)).startswith("~"):
            with read_write(tree):
                tree[f.name] = str(_expanded(value))


def _expanded(path: Any) -> Path:
    try:
        return expand_user(str(path))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def read_yaml(path: Path) -> DictConfig:
    """A YAML file of `section:` keys; ConfigError, in one line, for anything else."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise ConfigError(
                f"{path}: larger than {LARGEST_FILE >> 20} MiB, the most that is read; a config is a page"
            )
        layer = OmegaConf.load(io.StringIO(content.decode("utf-8")))
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception as error:  # a YAML error's class depends on the parser
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split()):.300}") from None
    if not isinstance(layer, DictConfig):
        raise ConfigError(f"{path}: must hold `section:` keys, found {type(layer).__name__}")
    return layer


def _check_keys(cls: type, layer: Any, prefix: str, source: str) -> None:
    known = {f.name: f for f in fields(cls)}
    for key in layer:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; keys here: {', '.join(known)}"
            raise ConfigError(f"{source}: unknown key {prefix}{key}{hint}")
        default = known[key].default_factory
        if isinstance(default, type) and is_dataclass(default):
            if not OmegaConf.is_dict(layer._get_node(key)):
                found = type(_plain(layer, key)).__name__
                raise ConfigError(f"{source}: {prefix}{key} is a section of keys, found a value of type {found}")
            _check_keys(default, layer[key], f"{prefix}{key}.", source)
        elif "off" in get_args(get_type_hints(cls)[key]) and _plain(layer, key) is False:
            layer[key] = "off"  # what YAML reads as a truth value
        elif type(value := _plain(layer, key)) is int and (text := refusal(known[key], value)):
            raise ConfigError(f"{prefix}{text}")  # OmegaConf cannot make a float of the largest ones


def _plain(layer: Any, key: Any) -> Any:
    """What a key of a YAML layer holds, not yet interpolated."""
    node = layer._get_node(key)
    return None if OmegaConf.is_config(node) else node._value()


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """section.key -> value of a config as nested mappings."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def settings_of(config: CommandConfig | type[CommandConfig]) -> dict[str, Any]:
    """section.key -> value of a config; of a class, its defaults."""
    tree: Any = OmegaConf.to_container(OmegaConf.structured(config))
    return flatten(tree)


def dump_config(config: CommandConfig) -> str:
    """The resolved config as YAML, every key written out."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
