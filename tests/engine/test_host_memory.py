"""The memory that control groups leave, read from files as the kernel lays them out."""

from __future__ import annotations

from pathlib import Path

import psutil

from megatron_gil.engine.host_memory import available_host_bytes, cgroup_room


def _write(directory: Path, **files: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text)


def test_every_limit_around_the_process_counts(tmp_path: Path) -> None:
    """Version 2: a job of 1000 bytes, its step without a limit, its task of 700; files in the cache may go."""
    job = tmp_path / "root/slurm/job_7"
    stat = "anon 5\ninactive_file 30\n"
    _write(job, memory__max="1000\n", memory__current="500\n", memory__stat=stat)
    _write(job / "step_0", memory__max="max\n", memory__current="450\n", memory__stat=stat)
    _write(job / "step_0/task_3", memory__max="700\n", memory__current="400\n", memory__stat="inactive_file 0\n")
    (tmp_path / "cgroup").write_text("1:name=systemd:/other\n0::/slurm/job_7/step_0/task_3\n")
    assert cgroup_room(tmp_path / "cgroup", tmp_path / "root") == [300, 530]


def test_version_1_as_a_container_sees_it(tmp_path: Path) -> None:
    """The group's own path is the host's; in the container its files lie at the root."""
    _write(
        tmp_path / "root/memory",
        memory__limit_in_bytes="2000\n",
        memory__usage_in_bytes="1500\n",
        memory__stat="inactive_file 1\ntotal_inactive_file 100\n",
    )
    (tmp_path / "cgroup").write_text("9:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n")
    assert cgroup_room(tmp_path / "cgroup", tmp_path / "root") == [600]


def test_without_control_groups(tmp_path: Path) -> None:
    assert cgroup_room(tmp_path / "none", tmp_path) == []
    assert 0 < available_host_bytes() <= psutil.virtual_memory().total
