"""docs/config.md and --help-config say of every key what the program does with it."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from megatron_gil.cli import CONFIGURED
from megatron_gil.config import COMMAND_CONFIGS
from megatron_gil.config.files import load_config
from megatron_gil.config.reference import help_text, key_groups, page

PAGE = Path(__file__).parents[1] / "docs/config.md"
KEYS = {name: [key for group in key_groups(cls) for key in group.keys] for name, cls in COMMAND_CONFIGS.items()}


def test_the_page_is_current() -> None:
    written = PAGE.read_text(encoding="utf-8")
    assert written == page(), "write it anew: python -m megatron_gil.config.reference > docs/config.md"


def test_every_configured_command_has_its_config() -> None:
    assert list(COMMAND_CONFIGS) == list(CONFIGURED)


@pytest.mark.parametrize("command", COMMAND_CONFIGS)
def test_every_key_is_listed_once_and_has_a_meaning(command: str) -> None:
    names = [key.name for key in KEYS[command]]
    expected = {
        f"{section.name}.{key.name}" if is_dataclass(section.default_factory) else section.name
        for section in fields(COMMAND_CONFIGS[command])
        for key in (fields(section.default_factory) if is_dataclass(section.default_factory) else [section])  # type: ignore[arg-type]
    }
    assert len(names) == len(set(names)) > 25
    assert set(names) == expected
    assert not [key.name for key in KEYS[command] if len(key.meaning.split()) < 3], "a string under the field says it"


@pytest.mark.parametrize("command", COMMAND_CONFIGS)
def test_the_defaults_are_those_that_a_run_has(command: str) -> None:
    """All of them given as overrides, in the form that the page prints, change nothing."""
    required = [f"{key.name}=x" for key in KEYS[command] if not key.default]
    printed = [f"{key.name}={key.default}" for key in KEYS[command] if key.default]
    assert load_config(COMMAND_CONFIGS[command], None, [*required, *printed]) == load_config(
        COMMAND_CONFIGS[command], None, required
    )


def test_what_is_accepted() -> None:
    accepts = {key.name: key.accepts for key in KEYS["ppo"]}
    assert accepts["ppo.advantages"] == "gae, rloo or grpo"
    assert accepts["ppo.gamma"] == "number in [0, 1]"
    assert accepts["gil.min_group_mass"] == "number in [0, 1)"
    assert accepts["gil.weight_floor"] == "number <= 1, or null"
    assert accepts["batch.micro_size"] == "integer >= 1"
    assert accepts["run.dir"] == "path"
    assert accepts["log.tensorboard"] == "true or false"


def test_each_command_prints_its_own_keys_and_defaults() -> None:
    ppo, sft = help_text("ppo", width=100), help_text("sft", width=100)
    assert "optimizer.lr=1e-6" in ppo
    assert "optimizer.lr=1e-5" in sft
    assert "gil.num_groups=2" in ppo
    assert "gil." not in sft
    for width in (80, 120):
        assert max(map(len, help_text("ppo", width=width).splitlines())) <= width


def test_help_config_needs_nothing_heavy() -> None:
    """Neither torch nor a config file, and exit code 0."""
    code = (
        "import sys; from megatron_gil.cli import main; code = main(['score', '--help-config']);"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^  output \(required\) +path$", done.stdout, flags=re.M), done.stdout
