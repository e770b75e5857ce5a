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
    names = ["import", "sft", "reward", "dpo", "ppo", "export", "generate", "score", "evaluate.main.score"]
    assert list(jobs) == [*names, "win_rates", "report"]
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


def test_the_jobs_of_two_tasks_and_a_language_model(tmp_path: Path) -> None:
    paths = ("--llama", tmp_path, "--data", tmp_path, "--output", tmp_path / "out")
    rubric = tmp_path / "rubric.txt"
    rubric.write_text("Which is funnier?")
    judge = ("--judge", "judge-70b", "--judge-url", "http://node:8000/v1", "--rubric", "harmless")
    more = ("--task", f"fun={tmp_path},{rubric}", "generate.fun:sampling.max_new_tokens=64", "score:data.max_tokens=99")
    shown = run(PIPELINE, "--dry-run", "--no-check", *paths, *judge, *more)
    assert shown.returncode == 0, shown.stderr
    jobs = {line.split("--job-name=")[1].split()[0]: line for line in shown.stderr.splitlines()}
    assert list(jobs)[6:] == [
        *("generate", "score", "evaluate.main.score", "evaluate.main.llm"),
        *("generate.fun", "score.fun", "evaluate.fun.score", "evaluate.fun.llm"),
        *("win_rates", "report"),
    ]
    for name, line in jobs.items():
        assert ("sampling.max_new_tokens=64" in line) == (name == "generate.fun"), name
        assert ("data.max_tokens=99" in line) == name.startswith("score"), name
        assert ("--model judge-70b --base-url http://node:8000/v1" in line) == name.endswith(".llm"), name
    assert f"output={tmp_path}/out/responses/fun/\\{{method\\}}.jsonl" in jobs["generate.fun"]
    assert "--rubric harmless" in jobs["evaluate.main.llm"]
    assert f"--rubric {rubric}" in jobs["evaluate.fun.llm"]
    assert f"--answers {tmp_path}/out/tables/fun.answers.sqlite" in jobs["evaluate.fun.llm"]
    waits = ":".join(f"\\$evaluate.{task}.{judge}" for task in ("main", "fun") for judge in ("score", "llm"))
    assert f"--dependency=afterok:{waits} " in jobs["win_rates"]
    assert jobs["win_rates"].count(".judgments.jsonl") == jobs["report"].count(".judgments.jsonl") == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "other"], "--task other is not NAME=DIR[,RUBRIC]"),
        (["--task", "other=absent"], "--task other: absent is not a directory"),
        (["--task", "main=."], "--task main is given twice, or is main"),
        (["--task", "other=.,short"], "rubric short of other: no such file, nor helpful, harmless or summary"),
        (["--judge-url", "http://judge/v1"], "--judge-url http://judge/v1 needs --judge"),
        (["--judge", "gpt-4.1"], "--judge gpt-4.1 has no key: set OPENAI_API_KEY, or give --judge-url"),
    ],
)
def test_a_wrong_evaluation_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    refused = run(PIPELINE, "--llama", tmp_path, "--data", tmp_path, "--output", tmp_path / "out", *options)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


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
