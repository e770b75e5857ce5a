"""What slurm/pipeline.sh would submit, on a machine without Slurm."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.ranks import PATIENCE_S
from tests.slurm.testbed import PROJECT

PIPELINE = PROJECT / "slurm" / "pipeline.sh"
SCRIPTS = sorted([*(PROJECT / "slurm").glob("*.s*"), *(PROJECT / "tests" / "slurm" / "cluster").glob("*.sh")])


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in arguments], capture_output=True, text=True, timeout=PATIENCE_S)


def test_the_jobs_of_the_paper_and_what_each_waits_for(tmp_path: Path) -> None:
    paths = ("--llama", tmp_path, "--data", tmp_path, "--output", tmp_path / "out")
    shown = run(PIPELINE, "--dry-run", "--no-check", *paths, "--nodes", "2", "ppo:gil.invariance_coef=0.3")
    assert shown.returncode == 0, shown.stderr
    jobs = {line.split("--job-name=")[1].split()[0]: line for line in shown.stderr.splitlines()}
    names = ["import", "sft", "reward", "dpo", "ppo", "generate", "score", "export", "evaluate", "report"]
    assert list(jobs) == names
    waits = {"sft": "import", "reward": "sft", "dpo": "sft", "ppo": "reward", "score": "generate", "export": "ppo"}
    for name, other in waits.items():
        assert f"--dependency=afterok:\\${other} --kill-on-invalid-dep=yes" in jobs[name]
    assert "--dependency=afterok:\\$ppo:\\$dpo" in jobs["generate"]
    assert "--array=0-2" in jobs["ppo"]
    assert "--array=0-4" in jobs["score"]
    for name, line in jobs.items():
        assert ("--nodes=2" in line) == (name in ("sft", "reward", "dpo", "ppo")), name
        assert ("gil.invariance_coef=0.3" in line) == (name == "ppo"), name
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--llama is not given"),
        (("--nodes",), "--nodes needs a value"),
        (("--what", "1"), "unknown argument --what"),
        (("--llama", "nowhere", "--data", "nowhere", "--output", "out"), "nowhere is not a directory"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    refused = run(PIPELINE, *arguments)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_lint(script: Path) -> None:
    assert run("bash", "-n", script).returncode == 0
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: only parsed")
    linted = run("shellcheck", "--severity=warning", "--exclude=SC2034,SC2154", script)
    assert linted.returncode == 0, linted.stdout
