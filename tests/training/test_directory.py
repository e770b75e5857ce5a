"""What a run directory says of the run: the commit of this project or none, the settings now and before."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from megatron_gil import config as c
from megatron_gil.config.files import load_config
from megatron_gil.training.run.directory import FIXED, RunDirectory, read_history, take_directory

PACKAGE = Path(__file__).parents[2] / "megatron_gil"


def _git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=directory, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _commit_seen_by(package: Path) -> str:
    code = "from megatron_gil.training.run.directory import git_commit; print(git_commit())"
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


@contextmanager
def _taken(config: c.TrainConfig) -> Iterator[RunDirectory]:
    with ExitStack() as at_end:
        taken = take_directory(config, stopping=lambda: False, patience_s=1.0, at_end=at_end)
        assert taken is not None
        yield taken


def _ppo(directory: Path, *overrides: str) -> c.PpoConfig:
    return load_config(c.PpoConfig, None, [f"run.dir={directory}", "models.policy=a", "run.seed=3", *overrides])


def _checkpoint(directory: Path) -> None:
    (directory / "checkpoints" / "iter_0000007").mkdir()


def _rows(directory: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if key not in ("time", "commit")} for row in read_history(directory)
    ]


def test_config_yaml_holds_what_is_in_force_and_a_history_what_was(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with _taken(_ppo(run)) as taken:
        assert taken.changes == []
        taken.record(0)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.yaml"]
    _checkpoint(run)
    later = _ppo(run, "optimizer.lr=0.5", "ppo.iterations=9")
    with _taken(later) as taken:
        assert [str(change) for change in taken.changes] == ["optimizer.lr: 1e-06 -> 0.5", "ppo.iterations: 2000 -> 9"]
        assert load_config(c.PpoConfig, run / "config.yaml", []) == _ppo(run)  # nothing was trained with it yet
        taken.record(7)
    assert load_config(c.PpoConfig, run / "config.yaml", []) == later
    rows = [
        {"iteration": 7, "key": "optimizer.lr", "old": 1e-6, "new": 0.5},
        {"iteration": 7, "key": "ppo.iterations", "old": 2000, "new": 9},
    ]
    assert _rows(run) == rows
    assert all(row["commit"] and row["time"].endswith("UTC") for row in read_history(run))
    with _taken(_ppo(run, "optimizer.lr=0.25", "ppo.iterations=9")) as taken:
        taken.record(4)  # the last checkpoint was damaged
    rows = [{**row, "iteration": 4} for row in rows]
    assert _rows(run) == [*rows, {"iteration": 4, "key": "optimizer.lr", "old": 0.5, "new": 0.25}]


def test_a_kill_between_history_and_config_leaves_no_change_twice(tmp_path: Path, monkeypatch: Any) -> None:
    run = tmp_path / "run"
    with _taken(_ppo(run)):
        before = (run / "config.yaml").read_text()
    for _ in range(2):
        with _taken(_ppo(run, "optimizer.lr=0.5", "optimizer.eps=1e-6")) as taken:
            taken.record(7)
        (run / "config.yaml").write_text(before)
    assert [row["key"] for row in _rows(run)] == ["optimizer.lr", "optimizer.eps"]


@pytest.mark.parametrize(
    "override",
    [
        "run.seed=4",
        "models.policy=b",
        "models.ref_policy=b",
        "models.dtype=bfloat16",
        "data.train=b.jsonl",
        "batch.global_size=16",
        "ppo.prompts=64",
        "ppo.responses_per_prompt=2",
        "gil.num_groups=3",
        "gil.init_scale=2",
    ],
)
def test_what_cannot_change_is_refused_once_there_is_a_checkpoint(override: str, tmp_path: Path) -> None:
    run, key = tmp_path / "run", override.partition("=")[0]
    with _taken(_ppo(run)):
        pass
    with _taken(_ppo(run, override)) as taken:
        assert [change.key for change in taken.changes] == [key]  # nothing to resume: it begins anew
    _checkpoint(run)
    with pytest.raises(c.ConfigError) as refused, _taken(_ppo(run, override)):
        pass
    assert f"holds a run with {key}=" in str(refused.value)
    assert "cannot change on a resume (" in str(refused.value)
    assert "set it back, or choose another run.dir" in str(refused.value)
    with _taken(_ppo(run)):  # the refused start holds nothing
        pass


def test_fixed_keys_are_keys() -> None:
    known = {f"{s.name}.{f.name}" for s in fields(c.PpoConfig) for f in fields(s.default_factory)}  # type: ignore[arg-type]
    assert set(FIXED) - known <= {"models.reward_tokenizer"}
    assert {key for key in known if key.startswith("models.")} - set(FIXED) <= {
        "models.layer",
        "models.recompute",
        "models.fusions",
        "models.offload",
    }, "how a model is computed may change, which one not"


def test_another_spelling_of_a_path_is_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with _taken(_ppo(Path("run"))):
        _checkpoint(Path("run"))
    with _taken(_ppo(tmp_path / "run", f"models.policy={tmp_path}/./a")) as taken:
        assert taken.changes == []


def test_a_run_of_an_older_version_lacks_keys(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with _taken(_ppo(run)):
        _checkpoint(run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("  num_groups: 2\n", "  gone: 5\n").replace("  seed: 3\n", ""))
    with _taken(_ppo(run)) as taken:
        assert [str(change) for change in taken.changes] == ["run.seed: 1 -> 3"]


def test_another_command_and_damaged_files_are_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with _taken(_ppo(run)):
        pass
    sft = load_config(c.SftConfig, None, [f"run.dir={run}"])
    with pytest.raises(c.ConfigError, match="holds a run of another command, with ppo settings"), _taken(sft):
        pass
    (run / "config_history.jsonl").write_text('{"iteration": 3}\n')
    with (
        pytest.raises(c.ConfigError, match=r"config_history\.jsonl: damaged"),
        _taken(_ppo(run, "run.seed=5")) as taken,
    ):
        taken.record(0)
    (run / "config_history.jsonl").unlink()
    (run / "config.yaml").write_text("- 5\n")
    with pytest.raises(c.ConfigError, match=r"config\.yaml: must hold `section:` keys"), _taken(_ppo(run)):
        pass


def test_what_a_start_killed_early_leaves_is_taken(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / ".config.yaml.tmp").touch()
    with _taken(_ppo(tmp_path / "run")) as taken:
        assert taken.changes == []
    (tmp_path / "foreign" / "checkpoints" / "theirs").mkdir(parents=True)
    with (
        pytest.raises(c.ConfigError, match=r"is not empty and holds no config\.yaml"),
        _taken(_ppo(tmp_path / "foreign")),
    ):
        pass
