"""What the documents tell a reader to type: files that are there, scripts that need no activated environment."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from megatron_gil.cli import COMMANDS

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(path for path in ROOT.rglob("*.md") if ".venv" not in path.parts)


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_what_a_document_names_is_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = {link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link}
    missing = {link for link in links if not (document.parent / link).exists()}
    configs = set(re.findall(r"--config (\S+\.yaml)", text)) - {"FILE.yaml"}
    missing |= {path for path in configs if not (ROOT / path).exists()}
    named = {path.rstrip(".,;:") for path in re.findall(r"\b((?:tools|examples|docs|slurm)/[\w./-]+)", text)}
    missing |= {path for path in named if not (ROOT / path).exists() and not (document.parent / path).exists()}
    assert not missing
    commands = set(re.findall(r"megatron-gil ([a-z-]+)", text)) | set(re.findall(r"-m megatron_gil ([a-z-]+)", text))
    assert commands <= set(COMMANDS)


def test_the_hh_example_finds_mistakes_before_it_trains(world: Path, tmp_path: Path) -> None:
    """With no environment activated; the last command's mistake is said before the first one trains."""
    pairs = [
        {"chosen": f"\n\nHuman: sun {i}\n\nAssistant: sea", "rejected": f"\n\nHuman: sun {i}\n\nAssistant: no"}
        for i in range(40)
    ]
    (tmp_path / "hh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    kept = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHON", "PYTHONPATH", "RANK")}
    environment = kept | {"PATH": "/usr/bin:/bin", "HF_DATASETS_CACHE": str(world / "cache"), "OMP_NUM_THREADS": "1"}
    arguments = [world / "policy", tmp_path / "hh.jsonl", tmp_path / "out"]
    for override, message in (
        ("generate:sampling.temprature=1", "did you mean sampling.temperature?"),
        ("train.updates=2", "megatron-gil ppo: override train.updates=2: unknown key train"),
    ):
        done = subprocess.run(
            [ROOT / "examples/hh/run.sh", *map(str, arguments), override],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 2, done.stderr
        assert message in done.stderr.splitlines()[-1], done.stderr
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data", "llama"]
