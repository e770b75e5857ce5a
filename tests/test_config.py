"""Every number of every section has a range, with neither NaN nor infinity; messages name key, value and range."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_gil import config as c
from megatron_gil.cli import _parse
from megatron_gil.config import IS_PATH
from megatron_gil.config.files import LARGEST_FILE, load_config
from megatron_gil.config.ranges import RANGE, Range, refusal

COMMANDS = tuple(c.COMMAND_CONFIGS.values())
REQUIRED = ["run.dir=x", "output=x"]


def _keys(cls: type, prefix: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """(dotted key, field, annotated type) of every key of a command."""
    types = typing.get_type_hints(cls)
    for f in fields(cls):
        if is_dataclass(f.default_factory):
            yield from _keys(f.default_factory, f"{prefix}{f.name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{f.name}", f, types[f.name]


KEYS = {(cls, key): (f, kind) for cls in COMMANDS for key, f, kind in _keys(cls)}
NUMBERS = {place: f for place, (f, kind) in KEYS.items() if {int, float} & {kind, *typing.get_args(kind)}}


def _load(cls: type, *overrides: str) -> Any:
    required = [text for text in REQUIRED if (cls, text.partition("=")[0]) in KEYS]
    return load_config(cls, None, [*required, *overrides])


def test_every_number_declares_its_range() -> None:
    assert len({key for _, key in NUMBERS}) > 60
    assert not [key for (_, key), f in NUMBERS.items() if not isinstance(f.metadata.get(RANGE), Range)]
    assert not [key for (_, key), f in NUMBERS.items() if f.default is not None and f.default not in f.metadata[RANGE]]


def test_nothing_outside_a_range_is_accepted() -> None:
    for f in {key: f for (_, key), f in NUMBERS.items()}.values():
        bounds = f.metadata[RANGE]
        values = [math.nan, math.inf, -math.inf, 10**400, -(10**400)]
        for edge, within, beyond in ((bounds.low, bounds.with_low, -1), (bounds.high, bounds.with_high, 1)):
            if math.isfinite(edge):
                values.append(edge + beyond if within else edge)
                assert bool(refusal(f, edge)) != within
        assert all(refusal(f, value).startswith(f"{f.name}=") for value in values), (f.name, values)


@pytest.mark.parametrize("value", ["nan", "1" + "0" * 400])
def test_the_whole_config_is_looked_through(value: str) -> None:
    for key, cls in {key: cls for cls, key in NUMBERS}.items():
        with pytest.raises(c.ConfigError) as refused:
            _load(cls, f"{key}={value}")
        assert key in str(refused.value)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.lr=inf", "optimizer.lr=inf must be at least 0 and finite"),
        ("optimizer.clip_grad=-1", "optimizer.clip_grad=-1 must be at least 0 and finite"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay=-1 must be at least 0 and finite"),
        ("critic_optimizer.beta1=1.5", "critic_optimizer.beta1=1.5 must be at least 0 and below 1"),
        ("run.max_skipped_updates=-1", "run.max_skipped_updates=-1 must be at least 0 and at most 1000000000"),
        ("run.seed=99999999999999999999", "run.seed=99999999999999999999 must be at least 0 and at most 4294967295"),
        ("run.seed=0x" + "f" * 9000, "run.seed=an integer of thousands of digits must be at least 0"),
        ("run.dir=0x" + "f" * 9000, "override run.dir=0xff"),
        ("parallel.timeout_s=-1", "parallel.timeout_s=-1 must be at least 1 and at most 2592000"),
        ("gil.weight_floor=2", "gil.weight_floor=2 must be at most 1"),
        ("gil.init_scale=nan", "gil.init_scale=nan must be finite"),
        ("gil.kl_target_high=0", "gil.kl_target_high=0 must be above 0"),
        ("ppo.kl_target=1", "ppo.kl_target holds one KL for all rows; with groups set gil.kl_target_high"),
        ("gil.kl_target_low=2", "gil.kl_target_high and gil.kl_target_low go together"),
    ],
)
def test_messages(override: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(c.ConfigError) as refused:
        _load(c.PpoConfig, override)
    assert str(refused.value).startswith(expected)


def test_a_section_made_in_code_is_checked_too() -> None:
    with pytest.raises(c.ConfigError, match=r"parallel\.tensor_size=0 must be at least 1"):
        c.ParallelSection(tensor_size=0)


def test_the_critics_optimizer_is_named() -> None:
    config = _load(c.PpoConfig, "critic_optimizer.lr=0.5")
    assert config.critic_optimizer.lr == 0.5
    assert (config.optimizer.key, config.critic_optimizer.key) == ("optimizer", "critic_optimizer")


def test_a_config_file_has_a_greatest_size(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("run: {dir: x}\n#" + "x" * LARGEST_FILE)
    with pytest.raises(c.ConfigError, match=r"run\.yaml: larger than 1 MiB, the most that is read"):
        load_config(c.SftConfig, path, [])
    path.write_text("run: {dir: x}\n#" + "x" * (LARGEST_FILE - 20))
    assert load_config(c.SftConfig, path, []).run.dir == "x"
    path.write_bytes(b"run: {dir: \xff}\n")
    with pytest.raises(c.ConfigError, match=r"run\.yaml: not valid YAML"):
        load_config(c.SftConfig, path, [])


PATHS = {(cls, key) for (cls, key), (f, _) in KEYS.items() if IS_PATH in f.metadata}


def test_a_tilde_is_the_users_home_in_every_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    texts = {key for (_, key), (_, kind) in KEYS.items() if str in {kind, *typing.get_args(kind)}}
    assert (
        texts - {"checkpoint.keep_best", "reward.function", "log.wandb"}
        == {key for _, key in PATHS}
        >= {"run.dir", "output", "data.train", "models.policy"}
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    for cls, key in PATHS:
        value: Any = _load(cls, f"{key}=~/x")
        for name in key.split("."):
            value = getattr(value, name)
        assert value == f"{tmp_path}/x"
    (tmp_path / "base.yaml").write_text("run: {dir: ~/y}\n")
    (tmp_path / "run.yaml").write_text("base: ~/base.yaml\n")
    assert load_config(c.SftConfig, tmp_path / "run.yaml", []).run.dir == f"{tmp_path}/y"
    with pytest.raises(c.ConfigError, match="~nobody-here/x: there is no home directory of that name"):
        _load(c.SftConfig, "run.dir=~nobody-here/x")


def test_a_tilde_in_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    report = _parse(["report", "~/a", "--output=~/page.html"])
    assert (report.runs, report.output) == ([tmp_path / "a"], tmp_path / "page.html")
    assert _parse(["sft", "--config=~/sft.yaml"]).config == tmp_path / "sft.yaml"
