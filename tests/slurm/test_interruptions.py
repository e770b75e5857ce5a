"""A run that is stopped in every way a cluster has, on a real Slurm: it saves, is requeued, and goes on."""

from __future__ import annotations

from pathlib import Path

from megatron_gil.demo.world import World
from tests.slurm.testbed import PROJECT, SlurmTestbed, iterations

TRAIN = PROJECT / "slurm" / "train.sbatch"
RECIPE = PROJECT / "megatron_gil" / "demo" / "recipes" / "sft.yaml"


def sft(world: World, run_dir: Path, *overrides: str) -> list[str | Path]:
    """The script and its arguments: an SFT run whose checkpoints come from stops alone."""
    paths = (f"run.dir={run_dir}", f"models.policy={world.model}", f"data.train={world.demonstrations}")
    return [TRAIN, "sft", "--config", RECIPE, *paths, "checkpoint.every=100000", "log.tensorboard=false", *overrides]


def test_every_way_of_stopping_loses_and_repeats_no_iteration(
    slurm: SlurmTestbed, miniature: World, tmp_path: Path
) -> None:
    run_dir, updates = tmp_path / "run", 300
    options = ("--nodes=2", "--partition=spot", "--job-name=stopped", "--time=10")
    job = slurm.submit(*options, *sft(miniature, run_dir, f"train.updates={updates}", "parallel.tensor_size=2"))

    def wait_until_under_way() -> None:
        before = len(iterations(run_dir))
        slurm.wait(lambda: len(iterations(run_dir)) > before + 10, "the next ten iterations")

    # What --signal=B:USR1@N sends when the time limit is near.
    wait_until_under_way()
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    slurm.wait(lambda: slurm.field(job, "Restarts") == "1", "the requeue after USR1")
    # An operator.
    wait_until_under_way()
    slurm.run("scontrol", "requeue", job)
    slurm.wait(lambda: slurm.field(job, "Restarts") == "2", "the requeue by scontrol")
    # A job of a partition that preempts.
    wait_until_under_way()
    urgent = slurm.run("sbatch", "--parsable", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true").stdout
    slurm.wait(lambda: slurm.field(job, "Restarts") == "3", "the requeue after preemption")
    assert slurm.wait_for_end(urgent.strip()) == "COMPLETED"
    # A node that fails.
    wait_until_under_way()
    slurm.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    slurm.wait(lambda: slurm.field(job, "Restarts") == "4", "the requeue after a node failure")

    assert slurm.wait_for_end(job) == "COMPLETED"
    assert iterations(run_dir) == list(range(updates))
    assert (run_dir / "final" / "policy" / "config.json").exists()
    log = (slurm.root / "stopped.log").read_text()
    assert log.count("resuming") >= 3, "the log of the first start must be kept"


def test_the_time_limit_saves_and_requeues_and_scancel_ends_for_good(
    slurm: SlurmTestbed, miniature: World, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    cluster = tmp_path / "cluster.sh"
    cluster.write_text((slurm.root / "cluster.sh").read_text().replace("save_seconds=60", "save_seconds=40"))
    arguments = sft(miniature, run_dir, "train.updates=1000000")
    options = ("--nodes=1", "--job-name=limit", "--time=1", "--signal=B:USR1@40")
    job = slurm.submit(*options, *arguments, MEGATRON_GIL_CLUSTER=str(cluster))
    slurm.wait(lambda: slurm.field(job, "Restarts") == "1", "the requeue at the time limit")
    slurm.run("scontrol", "update", f"jobid={job}", "timelimit=10")
    before = len(iterations(run_dir))
    slurm.wait(lambda: len(iterations(run_dir)) > before, "the next iterations")
    slurm.run("scancel", job)
    assert slurm.wait_for_end(job) == "CANCELLED"
    assert slurm.field(job, "Restarts") == "1"
    done = iterations(run_dir)
    assert done == list(range(len(done)))
    log = (slurm.root / "limit.log").read_text()
    assert "saved; requeueing" in log
    assert '"key": "run.max_minutes", "old": 0.3' in (run_dir / "config_history.jsonl").read_text()  # it is 9 now
    assert "after TERM" in log


def test_a_run_that_fails_by_itself_is_not_requeued(slurm: SlurmTestbed, miniature: World, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    checkpoint = run_dir / "checkpoints" / "iter_0000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("cut sho")
    (run_dir / "config.yaml").write_text("run: {}\n")
    failing = slurm.submit("--nodes=1", "--job-name=damaged", *sft(miniature, run_dir))
    wrong = slurm.submit("--nodes=1", "--job-name=wrong", *sft(miniature, tmp_path / "new", "optimizer.lr=-1"))
    assert slurm.wait_for_end(wrong) == "FAILED"
    assert slurm.wait_for_end(failing) == "FAILED"
    for job, code, name, reason in (
        (failing, 1, "damaged", "every checkpoint is damaged"),
        (wrong, 2, "wrong", "lr=-1"),
    ):
        assert slurm.field(job, "ExitCode") == f"{code}:0"
        assert slurm.field(job, "Restarts") == "0"
        last = (slurm.root / f"{name}.log").read_text().splitlines()[-1]
        assert f"FAILED with exit code {code}" in last
        assert reason in last
