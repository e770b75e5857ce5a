"""The floors of the house: imports go down only, the engine's libraries stay on their floors, files stay small."""

from __future__ import annotations

import ast
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_gil"
FILES = sorted(PACKAGE.rglob("*.py"))
FLOORS = {
    "types": 0,
    "config": 0,
    "paths": 0,
    "jsonl": 0,
    "console": 0,
    "__init__": 0,
    "algo": 1,
    "data": 1,
    "evaluation": 1,
    "parallel": 2,
    "models": 3,
    "engine": 4,
    "planning": 4,
    "training": 5,
    "commands": 6,
    "demo": 7,
    "cli": 7,
    "__main__": 7,
}
FORBIDDEN_NAMES = ("utils", "util", "helpers", "helper", "misc", "common")
CUT_MESSAGES = (
    "config/files",
    "config/section",
    "engine/host_memory",  # of the kernel's control groups
    "evaluation/report/page",
    "models/convert/bin_files",
    "parallel/layout",
    "parallel/watchdog",
    "training/run/lock",  # of the kernel's table of a process
    "jsonl",  # names it
)
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 80


def _part(path: Path) -> str:
    """The folder of a module of the package, or the module itself at its root."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def _imports(path: Path) -> tuple[tuple[int, str], ...]:
    """(line, full name of what is imported), inside functions too."""
    return tuple(_walk(ast.parse(path.read_text(encoding="utf-8"))))


def _walk(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_every_part_has_its_floor() -> None:
    assert {_part(path) for path in FILES} <= set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_imports_go_down_only(path: Path) -> None:
    here = _part(path)
    for line, name in _imports(path):
        if _in(name, "megatron_gil"):
            parts = name.split(".")
            part = parts[1] if len(parts) > 1 and parts[1] in FLOORS else "__init__"
            below = FLOORS[part] < FLOORS[here] or part == here or FLOORS[here] == FLOORS[part] in (0, 7)
            assert below, f"{path}:{line}: {here} (floor {FLOORS[here]}) imports {name} (floor {FLOORS[part]})"
        assert not _in(name, "tests"), f"{path}:{line}"


def test_one_floor_reads_the_command_line() -> None:
    readers = {_part(path) for path in FILES if any(_in(name, "argparse") for _, name in _imports(path))}
    assert readers <= {"cli", "commands"}


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_the_engines_libraries_stay_on_their_floors(path: Path) -> None:
    allowed = {
        "megatron": ("parallel", "models", "engine"),
        "torch.distributed": ("parallel", "engine"),
    }
    for line, name in _imports(path):
        for library, parts in allowed.items():
            assert not _in(name, library) or _part(path) in parts, f"{path}:{line}: {name} outside {parts}"
    if _part(path) not in allowed["torch.distributed"]:
        assert "torch.distributed." not in path.read_text(encoding="utf-8"), path


def test_one_file_builds_the_model_and_one_reads_parallel_state() -> None:
    found = {
        name: {_name(path) for path in FILES if any(_in(imported, name) for _, imported in _imports(path))}
        for name in ("megatron.core.parallel_state", "megatron.core.models.gpt.GPTModel")
    }
    assert found["megatron.core.parallel_state"] == {"megatron_gil/parallel/layout.py"}
    builders = {_name(path) for path in FILES if "GPTModel(" in path.read_text(encoding="utf-8")}
    assert builders == {"megatron_gil/models/transformer.py"}


def test_algo_is_pure() -> None:
    """Tensors and keyword scalars: nothing of ranks, files, configs or printing."""
    for path in (PACKAGE / "algo").glob("*.py"):
        own = [name for _, name in _imports(path) if _in(name, "megatron_gil")]
        assert all(_in(n, "megatron_gil.algo") or _in(n, "megatron_gil.types") for n in own), (path, own)
        source = path.read_text(encoding="utf-8")
        assert "print(" not in source, path
        assert "open(" not in source, path


def test_no_bag_of_leftovers() -> None:
    folders = [path for name in ("megatron_gil", "tools", "tests") for path in (ROOT / name).rglob("*")]
    assert not [path for path in folders if path.stem in FORBIDDEN_NAMES and path.suffix in ("", ".py")]


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_files_and_functions_are_small(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_FILE_LINES, path
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{path}:{node.lineno}: {node.name} has {length} lines"


def test_files_are_not_cut_at_unicode_line_ends() -> None:
    """str.splitlines() cuts inside of JSON text; `jsonl.iter_jsonl` reads files. Here it cuts messages and answers."""
    cutters = {_name(path) for path in FILES if ".splitlines(" in path.read_text(encoding="utf-8")}
    assert cutters <= {f"megatron_gil/{name}.py" for name in CUT_MESSAGES}


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_code_and_comments_are_ascii(path: Path) -> None:
    """Sample texts, in string literals, may be in any language."""
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            assert token.type == tokenize.STRING or token.string.isascii(), f"{path}:{token.start[0]}: {token.string}"


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_no_module_state_and_no_broad_silence(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not isinstance(node, ast.Global), f"{path}:{node.lineno}: global statement"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path}:{node.lineno}: bare except"
            assert not all(isinstance(x, ast.Pass) for x in node.body) or not _is_broad(node.type), (
                f"{path}:{node.lineno}: except Exception: pass"
            )


def _is_broad(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("Exception", "BaseException")


def test_contributing_shows_these_floors() -> None:
    table = re.findall(r"^\| (\d) \| (.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.M)
    shown = {
        name.removesuffix(".py"): int(floor) for floor, cell in table for name in re.findall(r"`(\w[\w.]*)/?`", cell)
    }
    assert shown == {name: floor for name, floor in FLOORS.items() if not name.startswith("__")}
