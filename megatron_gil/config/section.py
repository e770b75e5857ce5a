"""What every section of a config has: numbers with their ranges, and refusals of one line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from megatron_gil.config.ranges import outside

IS_PATH = "path"
"""Key of a field's metadata."""


class ConfigError(ValueError):
    """The user's configuration or data is wrong; the message is one line that names the key or file and the fix."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # it may quote what it refuses


def require(condition: bool, message: str) -> None:
    """ConfigError with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def path(default: Any = None) -> Any:
    """A field of a path, in which a leading ~ is the user's home."""
    return field(default=default, metadata={IS_PATH: True})


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A group of keys. Every number declares its range with its default; `_check` of a section says what else must
    hold."""

    key: ClassVar[str]
    """Where the section stands in a config."""

    def __post_init__(self) -> None:
        if refusal := outside(self):
            raise ConfigError(f"{self.key}.{refusal}")
        self._check()

    def _check(self) -> None: ...
