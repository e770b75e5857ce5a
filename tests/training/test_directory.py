"""What a run directory says of the run: the commit of this project or none, the settings now and before."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_gil"


def _git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=directory, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _commit_seen_by(package: Path) -> str:
    code = "from megatron_gil.training.directory import git_commit; print(git_commit())"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(package.parent)!r}); {code}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout.strip()


@pytest.mark.parametrize(
    ("place", "project", "tracked"),
    [
        (".", "megatron_gil", True),
        (".", "thesis", True),  # copied into another project and tracked there
        (".", "megatron_gil", False),
        (".venv/lib/python3/site-packages", "megatron_gil", False),
        ("src", "megatron_gil", True),
    ],
)
def test_the_commit_is_of_this_project_or_unknown(place: str, project: str, tracked: bool, tmp_path: Path) -> None:
    package = tmp_path / place / "megatron_gil"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "setup.py").write_text(f'setup(name="{project}")\n')
    (tmp_path / ".gitignore").write_text("__pycache__\n")
    _git(tmp_path, "init")
    _git(tmp_path, "add", "setup.py", ".gitignore", *([str(package)] if tracked else []))
    _git(tmp_path, "commit", "-m", "x")
    ours = (place, project, tracked) == (".", "megatron_gil", True)
    commit = _git(tmp_path, "rev-parse", "HEAD")
    assert _commit_seen_by(package) == (commit if ours else "unknown")
    if ours:
        (tmp_path / "setup.py").write_text(f'setup(name="{project}")  # changed\n')
        assert _commit_seen_by(package) == f"{commit}+changes"
