"""What the documents tell a reader to type: files that are there, scripts that need no activated environment."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

import pytest

from megatron_gil import config
from megatron_gil.cli import COMMANDS
from tests.ranks import PATIENCE_S

ROOT = Path(__file__).parents[1]
FILE_ENDINGS = (".py", ".sh", ".yaml", ".lock", ".json", ".html")
DOCUMENTS = sorted(path for path in ROOT.rglob("*.md") if not path.relative_to(ROOT).parts[0].startswith(".venv"))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_what_a_document_names_is_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = {link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link}
    missing = {link for link in links if not (document.parent / link).exists()}
    configs = set(re.findall(r"--config (\S+\.yaml)", text)) - {"FILE.yaml"}
    missing |= {path for path in configs if not (ROOT / path).exists()}
    folders = "tools|examples|docs|slurm|tests|megatron_gil"
    own = re.sub(r"https?://\S+", "", text)
    named = {path.rstrip(".,;:") for path in re.findall(rf"\b((?:{folders})/[\w./-]+)", own)}
    missing |= {path for path in named if not (ROOT / path).exists() and not (document.parent / path).exists()}
    assert not missing
    commands = set(re.findall(r"megatron-gil ([a-z-]+)", text)) | set(re.findall(r"-m megatron_gil ([a-z-]+)", text))
    assert commands <= set(COMMANDS)


def _first_cells(document: str) -> list[str]:
    rows = re.findall(r"^\| (.*?) \|", (ROOT / document).read_text(encoding="utf-8"), flags=re.M)
    return [code for cell in rows for code in re.findall(r"`([^`]+)`", cell)]


def _keys() -> set[str]:
    kinds = (config.SftConfig, config.RewardConfig, config.DpoConfig, config.PpoConfig, config.AuditConfig)
    sections = [(f.name, f.default_factory) for kind in kinds for f in fields(kind) if f.name != "output"]
    return {f"{name}.{f.name}" for name, section in sections for f in fields(section)}  # type: ignore[arg-type]


def test_every_message_of_the_troubleshooting_is_one_that_the_program_has() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "megatron_gil").rglob("*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # one text over several lines
    missing = [code for code in _first_cells("docs/troubleshooting.md") if code not in source]
    assert not missing


def test_keys_that_the_documents_name_exist() -> None:
    known, sections = _keys(), {key.partition(".")[0] for key in _keys()}
    named = {key for key in _first_cells("docs/names.md") if "*" not in key and "." in key}
    for document in (path for path in DOCUMENTS if path.name != "names.md"):  # whose other columns are others' keys
        found = re.findall(r"`([a-z_]+\.[a-z_0-9]+)(?:=[^`]*)?`", document.read_text(encoding="utf-8"))
        named |= {key for key in found if key.partition(".")[0] in sections and not key.endswith(FILE_ENDINGS)}
    assert named <= known, named - known


def test_the_names_of_trl_are_trls() -> None:
    trl = pytest.importorskip("trl")
    ppo = pytest.importorskip("trl.experimental.ppo")
    known = {f.name for kind in (trl.SFTConfig, trl.DPOConfig, trl.RewardConfig, ppo.PPOConfig) for f in fields(kind)}
    text = (ROOT / "docs/names.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| `[^|]+\| ([^|]+) \|", text, flags=re.M)
    named = {name for cell in cells if "of the trainer" not in cell for name in re.findall(r"`(\w+)`", cell)}
    assert len(named) > 20
    assert named <= known | {"train"}, named - known


def test_the_hh_example_finds_mistakes_before_it_trains(world: Path, tmp_path: Path) -> None:
    """With no environment activated; the last command's mistake is said before the first one trains."""
    pairs = [
        {"chosen": f"\n\nHuman: sun {i}\n\nAssistant: sea", "rejected": f"\n\nHuman: sun {i}\n\nAssistant: no"}
        for i in range(40)
    ]
    (tmp_path / "hh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    kept = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHON", "PYTHONPATH", "RANK")}
    if not (ROOT / ".venv").exists():  # the tests run in another
        kept["PYTHON"] = sys.executable
    environment = kept | {"PATH": "/usr/bin:/bin", "HF_DATASETS_CACHE": str(world / "cache"), "OMP_NUM_THREADS": "1"}
    llama = shutil.copytree(world / "policy", tmp_path / "policy")  # with positions enough for the example's rows
    sizes = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**sizes, "max_position_embeddings": 1024}))
    arguments = [llama, tmp_path / "hh.jsonl", tmp_path / "out"]
    for override, message in (
        ("generate:sampling.temprature=1", "did you mean sampling.temperature?"),
        ("train.updates=2", "megatron-gil ppo: override train.updates=2: unknown key train"),
    ):
        done = subprocess.run(
            [ROOT / "examples/hh/run.sh", *map(str, arguments), override],
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert done.returncode == 2, done.stderr
        assert message in done.stderr.splitlines()[-1], done.stderr
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data", "llama"]


def _fenced(document: str, heading: str) -> str:
    """The first fenced or indented block below a heading, without its indentation."""
    below = (ROOT / document).read_text(encoding="utf-8").partition(f"## {heading}\n")[2]
    found = re.search(r"```\w*\n(.*?)```|((?:^    [^\n]*\n)+)", below, flags=re.S | re.M)
    assert found, heading
    return textwrap.dedent(found[1] or found[2])


def test_one_iteration_is_the_codes() -> None:
    source = (ROOT / "megatron_gil/training/ppo/iteration.py").read_text(encoding="utf-8")
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    iterate = ast.get_source_segment(source, next(node for node in nodes if node.name == "iterate"))
    assert iterate is not None
    assert _fenced("README.md", "One iteration").split() == iterate.split(), "copy PpoTrainer.iterate into README.md"


def test_the_tree_of_the_readme_is_the_projects() -> None:
    listed = {
        Path(line.split()[0]) for line in _fenced("README.md", "Where things are").splitlines() if line[:1] != " "
    }
    inside = {
        Path(line.split()[0]) for line in _fenced("README.md", "Where things are").splitlines() if line[:1] == " "
    }
    package = ROOT / "megatron_gil"
    assert {path.name for path in package.iterdir() if (path / "__init__.py").exists()} <= {
        str(path) for path in inside
    }
    missing = [path for path in inside if not (package / path).exists()]
    missing += [path for path in listed if not (ROOT / path).is_dir()]
    assert not missing


def test_every_metric_of_a_run_is_in_the_table() -> None:
    names = set()
    for path in (ROOT / "tests/golden").glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            names |= {name.removeprefix("eval/") for name in row if "iteration" in row}  # its first line has versions
    assert len(names) > 50
    forms = _first_cells("docs/metrics.md")
    patterns = [re.sub("NAME$|^MODEL", r"[a-z_]+", re.sub("_G$", r"_\\d+", form)) for form in forms]
    missing = {name for name in names if not any(re.fullmatch(pattern, name) for pattern in patterns)}
    assert not missing
