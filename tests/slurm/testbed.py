"""A real Slurm for tests: slurmctld and two slurmd from the packages, on this machine, without systemd."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_gil.jsonl import iter_jsonl
from tests.ranks import PATIENCE_S

PROJECT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).with_name("cluster")
PROGRAMS = ("slurmctld", "slurmd", "munged", "mungekey", "sbatch", "srun", "unshare")
SEARCH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

CLUSTER = """\
job_options=()
train_options=(--ntasks-per-node=1 --time=10)
tool_options=(--nodes=1 --ntasks=1 --time=10)
save_seconds=60
max_requeues=5
container_image= apptainer_image= venv={venv}
mounts=() modules=() datasets_cache={cache} network_interface=
"""


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]


@dataclass(frozen=True, slots=True)
class SlurmTestbed:
    """A cluster that runs, and the environment of a shell that submits to it."""

    root: Path
    env: dict[str, str]

    def run(self, *command: str | Path, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(part) for part in command],
            env={**self.env, **env},
            cwd=self.root,
            capture_output=True,
            text=True,
            check=check,
            timeout=PATIENCE_S,
        )

    def submit(self, *arguments: str | Path, **env: str) -> str:
        """The number of a job of slurm/train.sbatch."""
        options = ("--parsable", "--signal=B:USR1@60", "--ntasks-per-node=1", "--output=%x.log")
        return self.run("sbatch", *options, *arguments, check=True, **env).stdout.strip()

    def field(self, job: str, name: str) -> str:
        """One field of `scontrol show job`."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job).stdout
        return next(part.partition("=")[2] for part in shown.split() if part.startswith(f"{name}="))

    def state(self, job: str) -> str:
        return self.field(job, "JobState")

    def states(self, jobs: list[str]) -> dict[str, set[str]]:
        """Of each job, the states of its array tasks."""
        shown = self.run("squeue", "--noheader", "--states=all", "--jobs", ",".join(jobs), "--format=%A %F %T").stdout
        found: dict[str, set[str]] = {}
        for line in shown.splitlines():
            _, array_job, state = line.split()
            found.setdefault(array_job, set()).add(state)
        return found

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, (
                f"{what} did not happen within {PATIENCE_S:.0f} s\n{self.run('squeue').stdout}"
            )
            time.sleep(0.1)

    def wait_for_end(self, job: str) -> str:
        """The state in which a job ended."""
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}
        self.wait(lambda: self.state(job) in ends, f"the end of job {job}")
        return self.state(job)


@contextmanager
def start_testbed(root: Path) -> Iterator[SlurmTestbed]:
    """Two nodes; each with a network of its own where this machine allows that, else with a host name of its own."""
    directory = root / "cluster"
    for kind in ("net", "uts"):
        started = subprocess.run(
            [str(SCRIPTS / "start.sh"), str(directory), f"ns={kind}"],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        if started.returncode == 0:
            break
    else:
        raise RuntimeError(f"the test cluster did not start: {started.stderr}")
    settings = root / "cluster.sh"
    settings.write_text(CLUSTER.format(venv=sys.prefix, cache=root / "cache"))
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MEGATRON_GIL_"))},
        "PATH": SEARCH,
        "SLURM_CONF": str(directory / "etc" / "slurm.conf"),
        "MEGATRON_GIL_CLUSTER": str(settings),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(PROJECT),
    }
    try:
        yield SlurmTestbed(root, env)
    finally:
        subprocess.run([str(SCRIPTS / "stop.sh"), str(directory)], check=True, timeout=PATIENCE_S)


def iterations(run_dir: Path) -> list[int]:
    """The iterations that a run has logged, in the order of the file."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    return [row["iteration"] for _, row in iter_jsonl(path, growing=True)]
