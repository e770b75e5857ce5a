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
    run_dir, updates = tmp_path / "run", 200
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
