"""slurm/pipeline.sh on a real Slurm: the whole chain, and a chain that a stage breaks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_gil.demo.world import World
from megatron_gil.jsonl import iter_jsonl
from tests.slurm.testbed import PROJECT, SlurmTestbed, iterations

PIPELINE = PROJECT / "slurm" / "pipeline.sh"
RECIPES = Path(__file__).with_name("recipes")
METHODS = ("ppo_gil", "ppo")


@pytest.fixture(scope="module")
def data(miniature: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature's files as tools/prepare_data.py lays them out."""
    root = tmp_path_factory.mktemp("data")
    files = {
        "demonstrations": (miniature.demonstrations, miniature.demonstrations),
        "preferences": (miniature.preferences, miniature.preferences_eval),
        "prompts": (miniature.prompts, miniature.prompts_eval),
    }
    for name, sources in files.items():
        for split, source in zip(("train", "eval"), sources, strict=True):
            (root / split).mkdir(exist_ok=True)
            shutil.copyfile(source, root / split / f"{name}.jsonl")
    return root


def pipeline(miniature: World, data: Path, out: Path, *more: str) -> list[str | Path]:
    paths = ["--llama", miniature.model, "--data", data, "--output", out, "--recipes", RECIPES]
    return [PIPELINE, *paths, "--methods", " ".join(METHODS), "--nodes", "2", *more]


def jobs_of(out: Path) -> list[str]:
    return (out / "jobs").read_text().split()


def finish(slurm: SlurmTestbed, out: Path) -> dict[str, set[str]]:
    """The states in which the jobs of a chain ended."""
    under_way = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED"}
    jobs = jobs_of(out)
    slurm.wait(lambda: not set.union(*slurm.states(jobs).values()) & under_way, "the end of the chain")
    return slurm.states(jobs)


def test_the_whole_chain(slurm: SlurmTestbed, miniature: World, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    other = f"other={data / 'eval'},summary"
    slurm.run(*pipeline(miniature, data, out, "--task", other, "generate.other:sampling.max_new_tokens=4"))
    states = finish(slurm, out)
    log = (out / "pipeline.log").read_text()
    assert set.union(*states.values()) == {"COMPLETED"}, f"{states}\n{log}"

    for run, count in {"sft": 12, "reward": 6, "dpo": 4, "ppo_gil": 4, "ppo": 4}.items():
        assert iterations(out / run) == list(range(count)), run
        assert (out / run / "final").is_symlink()
    for method in ("sft", "dpo", *METHODS):
        for task in (".", "other"):
            rows = [row for _, row in iter_jsonl(out / "scores" / task / f"{method}.jsonl")]
            assert len(rows) == 16, method
            assert all(isinstance(row["score"], float) for row in rows)
        assert all(len(row["response"].split()) <= 4 for row in rows)
    assert (out / "policy_hf" / "config.json").exists()
    tables = json.loads((out / "win_rates.json").read_text())["tables"]
    assert [(t["judge"], t["task"], t["ours"]) for t in tables] == [
        ("reward model", "main", "ppo_gil"),
        ("reward model", "other", "ppo_gil"),
    ]
    assert all(set(table["opponents"]) == {"sft", "dpo", "ppo"} for table in tables)
    assert "ppo_gil on other by reward model" not in (out / "report.html").read_text()  # one table holds both tasks
    assert "<td>other</td>" in (out / "report.html").read_text()
    assert (out / "report.html").stat().st_size > 10_000
    assert log.count("2 node(s) n[1-2], 2 task(s)") == 5
    assert "FAILED" not in log

    slurm.run(*pipeline(miniature, data, out, "--task", other, "--no-check"))  # again: what is done stays, and says so
    assert set.union(*finish(slurm, out).values()) == {"COMPLETED"}
    said = (out / "pipeline.log").read_text().removeprefix(log).splitlines()
    assert len(said) == 27
    assert all("done before" in line for line in said)


def test_a_stage_that_fails_stops_the_chain_and_says_why_in_one_place(
    slurm: SlurmTestbed, miniature: World, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    broken = tmp_path / "data"
    shutil.copytree(data, broken)
    slurm.run(*pipeline(miniature, broken, out, "--no-check"))
    (broken / "train" / "demonstrations.jsonl").write_text('{"prompt": "no completion"}\n')
    states = finish(slurm, out)
    by_job = [states[job] for job in jobs_of(out)]
    assert by_job[:2] == [{"COMPLETED"}, {"FAILED"}]
    assert set.union(*by_job[2:]) == {"CANCELLED"}
    failures = [line for line in (out / "pipeline.log").read_text().splitlines() if "FAILED" in line]
    assert len(failures) == 1
    for text in ("sft", "exit code 2", "demonstrations.jsonl", "completion", "not requeued", str(out / "logs")):
        assert text in failures[0]


def test_what_is_wrong_is_found_before_anything_is_submitted(
    slurm: SlurmTestbed, miniature: World, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    refused = slurm.run(*pipeline(miniature, data, out, "sft:batch.global_size=7"), check=False)
    assert refused.returncode == 2
    assert "batch.global_size=7 cannot be divided" in refused.stderr
    assert "stage sft" in refused.stderr
    assert not out.exists()


def test_the_settings_as_they_are_shipped_ask_for_what_slurm_can_give(slurm: SlurmTestbed) -> None:
    script = """
        . slurm/cluster.sh
        sbatch --test-only "${job_options[@]}" "${train_options[@]}" --partition=batch --nodes=2 slurm/train.sbatch ppo
        sbatch --test-only "${job_options[@]}" "${tool_options[@]}" --partition=batch slurm/tool.sbatch product command
    """
    tried = slurm.run("bash", "-ec", f"cd {PROJECT}\n{script}")
    assert "using 192 processors on nodes n[1-2]" in tried.stderr
    assert "using 8 processors on nodes n1" in tried.stderr
