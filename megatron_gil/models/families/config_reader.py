"""config.json, as transformers 4 or 5 writes it, value by value; what is wrong is a ConfigError that names file and
key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_gil.config import ConfigError

TokenIds = int | tuple[int, ...] | None

MOST = {
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 30,
    "sliding_window": 1 << 30,
    "max_window_layers": 1 << 30,
}
"""Limits far above any model: a larger size is a mistake, and reading such a model would take hours."""
FIXED = (
    ("hidden_act", "silu", "silu"),
    ("attention_bias", False, False),
    ("mlp_bias", False, False),
    ("partial_rotary_factor", 1.0, 1.0),
    ("dual_chunk_attention_config", None, None),
)
"""Options of all families that change what is computed, and that none here computes otherwise: key, the only value,
and what a config without the key means."""


def read_config(hf_dir: Path) -> Any:
    """What config.json holds, not yet checked."""
    path = Path(hf_dir) / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's stretching of RoPE's long wavelengths."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True)
class ConfigReader:
    raw: dict[str, Any]
    source: str
    """The file's name in messages."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers takes where a key is absent."""

    def check_architecture(self, name: str, known_names: list[str]) -> None:
        """No option and no class that computes otherwise. name: the family's."""
        for key, expected, default in FIXED:
            found = self.raw.get(key, default)
            if found != expected:
                raise ConfigError(
                    f"{self.source}: {key} is {found!r}, expected {expected!r}: no other {name} is supported"
                )
        architectures = self.raw.get("architectures") or []
        if not isinstance(architectures, list):
            raise ConfigError(f"{self.source}: architectures is {architectures!r}, expected a list of names")
        for architecture in architectures:
            if architecture not in (*known_names, f"{name}Model"):
                known = " or ".join(known_names)
                raise ConfigError(f"{self.source}: architectures is {architecture!r}, expected {known}")

    def get(self, key: str) -> Any:
        return self.raw.get(key, self.defaults.get(key))

    def size(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """default: what null means too."""
        found = self.get(key)
        if found is None:
            found = default
        if not isinstance(found, int) or isinstance(found, bool) or not least <= found <= MOST[key]:
            raise ConfigError(f"{self.source}: {key} is {found!r}, expected a whole number from {least} to {MOST[key]}")
        return found

    def number(self, key: str, default: float | None = None, table: dict[str, Any] | None = None) -> float:
        found = (self.raw if table is None else table).get(key)
        if found is None:
            found = default
        if not isinstance(found, int | float) or isinstance(found, bool) or not 0 < found < 2**63:
            raise ConfigError(f"{self.source}: {key} is {found!r}, expected a number above 0")
        return float(found)

    def flag(self, key: str) -> bool:
        found = self.raw.get(key)
        if found is not None and not isinstance(found, bool):
            raise ConfigError(f"{self.source}: {key} is {found!r}, expected true or false")
        return bool(found)

    def token_ids(self, key: str) -> TokenIds:
        found = self.raw.get(key)
        if isinstance(found, list) and all(isinstance(i, int) for i in found):
            return tuple(found)
        if found is not None and not isinstance(found, int):
            raise ConfigError(f"{self.source}: {key} is {found!r}, expected a token id, a list of them or null")
        return found

    def window(self) -> int | None:
        """sliding_window; None where it is null."""
        return None if self.get("sliding_window") is None else self.size("sliding_window")

    def window_of(self, window: int | None, types: Any, key: str) -> int | None:
        """The window of all layers. types: transformers' names of each layer's attention, by the key that asks for
        them; ConfigError for a mix, and for a window that is not set."""
        known = ["full_attention"] if window is None else ["full_attention", "sliding_attention"]
        found = sorted(set(map(str, types))) if isinstance(types, list) else [repr(types)]
        if len(found) != 1 or found[0] not in known:
            raise ConfigError(
                f"{self.source}: {key} asks for {' and '.join(found) or 'nothing'}, expected {' or '.join(known)} in "
                "all layers"
            )
        return window if found == ["sliding_attention"] else None

    def rope(self) -> tuple[float, Llama3Scaling | None]:
        """transformers 5: all in rope_parameters; transformers 4: rope_theta and rope_scaling."""
        table = self.raw.get("rope_scaling") or self.raw.get("rope_parameters") or {}  # transformers' own order
        if not isinstance(table, dict):
            raise ConfigError(f"{self.source}: rope_parameters is {table!r}, expected a JSON object")
        if nested := [key for key, value in table.items() if isinstance(value, dict)]:
            raise ConfigError(
                f"{self.source}: rope_parameters has a table for {nested[0]}, expected one rope_type for all layers"
            )
        theta = self.number("rope_theta", self.number("rope_theta", 10000.0), table)
        kind = table.get("rope_type", table.get("type", "default"))
        if (share := table.get("partial_rotary_factor", 1.0)) != 1.0:
            raise ConfigError(f"{self.source}: partial_rotary_factor is {share!r}, expected 1.0")
        if kind == "default":
            return theta, None
        if kind != "llama3":
            raise ConfigError(f"{self.source}: rope_type is {kind!r}, expected 'default' or 'llama3'")
        key = "original_max_position_embeddings"
        if (original := self.number(key, table=table)) != (other := self.raw.get(key, original)):
            raise ConfigError(
                f"{self.source}: {key} is {other!r}, and {original:g} in rope_parameters; leave the first out"
            )
        return theta, Llama3Scaling(
            factor=self.number("factor", table=table),
            low_freq_factor=self.number("low_freq_factor", table=table),
            high_freq_factor=self.number("high_freq_factor", table=table),
            original_max_positions=int(original),
        )
