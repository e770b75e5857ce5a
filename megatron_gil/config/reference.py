"""Every key of every command with its default and meaning: the page docs/config.md and `--help-config`.

Both are read from the config's classes and from the string under each field, so neither can say what the program does
not do. `python -m megatron_gil.config.reference > docs/config.md` writes the page.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from megatron_gil.config.commands import COMMAND_CONFIGS
from megatron_gil.config.ranges import LARGEST_INTEGER, RANGE, Range
from megatron_gil.config.section import IS_PATH

INTRODUCTION = """\
# Every key of a config

<!-- Written by `python -m megatron_gil.config.reference > docs/config.md`. Change the texts in megatron_gil/config. -->

`sft`, `reward`, `dpo`, `ppo`, `generate`, `score`, `evaluate-reward` and `audit` take their settings from a YAML file
and from the command line:

    megatron-gil ppo --config FILE.yaml run.dir=runs/gil ppo.kl_coef=0.1

A file holds sections of keys. It may name another file as its base, relative to itself; then it says only what differs:

```yaml
base: ppo.yaml
ppo:
  kl_coef: 0.05
gil:
  num_groups: 2
  weight_floor: null
```

Later settings win: first come the defaults below, then the base, then the file, then each `section.key=value` from left
to right. An unknown key, a wrong type or a number out of its range ends the command before it starts, with one line
that names the key. `null` means none; a leading `~` in a path is your home. A key without a default is marked
*required*. Which other paths a command needs (`models.policy`, `data.train`, ...) it says itself; `--dry-run` checks
that and all the rest.

A run directory's `config.yaml` has every key written out, and is a config file too. `megatron-gil ppo --help-config`
prints the keys of one command, with its own defaults. The names that TRL and verl have for them: [names.md](names.md).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One setting of one command."""

    name: str
    """section.key, as it is written on the command line."""
    accepts: str
    default: str
    """As in YAML; empty where the user must set it."""
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyGroup:
    """The keys of one section of one command."""

    section: str
    meaning: str
    keys: tuple[Key, ...]


def key_groups(config: type) -> tuple[KeyGroup, ...]:
    """The sections of a command's config in its own order, then the keys that stand in no section."""
    sections = [
        KeyGroup(
            section=f.name, meaning=_own_doc(f.default_factory), keys=tuple(_keys(f.default_factory, f"{f.name}."))
        )
        for f in fields(config)
        if is_dataclass(f.default_factory) and isinstance(f.default_factory, type)
    ]
    alone = tuple(_keys(config, ""))
    return (*sections, *(KeyGroup(section=key.name, meaning="", keys=(key,)) for key in alone))


def help_text(command: str, *, width: int) -> str:
    """The keys of one command for a terminal of so many columns."""
    lines = [f"Settings of megatron-gil {command}: key=default, what the key accepts, its meaning."]
    lines += ["Set them in the file of --config, or behind the command as section.key=value."]
    for group in key_groups(COMMAND_CONFIGS[command]):
        lines += ["", group.section.upper()]
        lines += textwrap.wrap(group.meaning.replace("`", ""), width)
        for key in group.keys:
            setting = f"  {key.name}={key.default}" if key.default else f"  {key.name} (required)"
            lines.append(f"{setting:<42}  {key.accepts}")
            indent = 6 * " "
            lines += textwrap.wrap(key.meaning, width, initial_indent=indent, subsequent_indent=indent)
    return "\n".join(lines)


def page() -> str:
    """docs/config.md."""
    groups = {name: {g.section: g for g in key_groups(config)} for name, config in COMMAND_CONFIGS.items()}
    sections = list(dict.fromkeys(section for of_command in groups.values() for section in of_command))
    known = {key.name for of_command in groups.values() for g in of_command.values() for key in g.keys}
    rows = ["| section | commands |", "|---|---|"]
    bodies = []
    for section in sections:
        here = {name: of_command[section] for name, of_command in groups.items() if section in of_command}
        rows.append(f"| [{section}](#{section}) | {_code_list(here)} |")
        meanings = " ".join(dict.fromkeys(g.meaning for g in here.values() if g.meaning))
        commands = "all commands" if len(here) == len(groups) else _code_list(here)
        bodies += ["", f"## {section}", "", f"In {commands}. {_marked(meanings, known)}".rstrip(), ""]
        bodies += ["| key | accepts | default | meaning |", "|---|---|---|---|", *_table(here, known)]
    return "\n".join([INTRODUCTION, *rows, *bodies]) + "\n"


def _table(groups: Mapping[str, KeyGroup], known: set[str]) -> Iterator[str]:
    """A row for each key; where commands differ it says so."""
    names = dict.fromkeys(key.name for group in groups.values() for key in group.keys)
    for name in names:
        found = {command: key for command, group in groups.items() for key in group.keys if key.name == name}
        first = next(iter(found.values()))
        others = {command: key.default for command, key in found.items() if key.default != first.default}
        default = f"`{first.default}`" if first.default else "*required*"
        default += "".join(f"; {command}: `{text}`" for command, text in others.items())
        meaning = first.meaning
        if len({key.meaning for key in found.values()}) > 1:
            meaning = " ".join(f"{command}: {key.meaning}" for command, key in found.items())
        only = f"In {_code_list(found)}. " if len(found) < len(groups) else ""
        yield f"| `{name}` | {first.accepts} | {default} | {only}{_marked(meaning, known)} |"


def _code_list(commands: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(f"`{command}`" for command in commands)


def _marked(meaning: str, known: set[str]) -> str:
    """With keys as code, and nothing that Markdown would read as a table's border or a tag."""
    text = re.sub(r"(?<![`\w.])([a-z_]+\.[a-z_0-9]+)((?:=\w+)?)(?![`\w])", lambda m: _as_code(m, known), meaning)
    return text.replace("|", "\\|").replace("<", "&lt;")


def _as_code(found: re.Match[str], known: set[str]) -> str:
    return f"`{found[0]}`" if found[1] in known else found[0]


def _keys(cls: Any, prefix: str) -> Iterator[Key]:
    types = get_type_hints(cls)
    for f in fields(cls):
        if f.default is NO_DEFAULT:
            continue  # a section
        yield Key(
            name=f"{prefix}{f.name}",
            accepts=_accepts(types[f.name], f),
            default=_as_yaml(f.default),
            meaning=_meaning(cls, f.name),
        )


def _accepts(kind: Any, of: Field[Any]) -> str:
    parts = get_args(kind) if get_origin(kind) is not Literal else ()
    if type(None) in parts:
        (inner,) = (part for part in parts if part is not type(None))
        return f"{_accepts(inner, of)}, or null"
    if get_origin(kind) is Literal:
        *most, last = (_as_yaml(choice) for choice in get_args(kind))
        return f"{', '.join(most)} or {last}"
    if kind is str:
        return "path" if IS_PATH in of.metadata else "text"
    if kind is bool:
        return "true or false"
    return f"{'integer' if kind is int else 'number'}{_bounds(of.metadata[RANGE])}"


def _bounds(allowed: Range) -> str:
    """Such as ` >= 0` or ` in [0, 1)`; the bound that every integer has is left out."""
    has_low, has_high = allowed.low > -math.inf, allowed.high not in (math.inf, LARGEST_INTEGER)
    low, high = f"{allowed.low:.10g}", f"{allowed.high:.10g}"
    if has_low and has_high:
        return f" in {'[' if allowed.with_low else '('}{low}, {high}{']' if allowed.with_high else ')'}"
    if has_low:
        return f" {'>=' if allowed.with_low else '>'} {low}"
    return f" {'<=' if allowed.with_high else '<'} {high}" if has_high else ""


def _as_yaml(value: Any) -> str:
    if value == MISSING:
        return ""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return re.sub(r"e-0", "e-", str(value))


def _meaning(cls: type, name: str) -> str:
    """The string under the field, in the class itself or in the one that it inherits the meaning from."""
    return next((found[name] for c in cls.__mro__ if name in (found := _texts(c.__module__).get(c.__name__, {}))), "")


def _own_doc(cls: Any) -> str:
    return _texts(cls.__module__).get(cls.__name__, {}).get("", "")


@cache
def _texts(module: str) -> dict[str, dict[str, str]]:
    """{class: {field: the string under it}} of a module's source; the class's own docstring stands under ""."""
    if not module.startswith("megatron_gil."):
        return {}
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: dict(_texts_of(node)) for node in tree.body if isinstance(node, ast.ClassDef)}


def _texts_of(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    yield "", " ".join((ast.get_docstring(node) or "").split())
    for statement, after in zip(node.body, node.body[1:], strict=False):
        match statement, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, " ".join(text.split())


if __name__ == "__main__":
    print(page(), end="")
