"""How much more memory the processes of this host may take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil


def available_host_bytes() -> int:
    """What the host has free or can free, or less where a control group, as of Slurm or a container, allows less."""
    free = psutil.virtual_memory().available
    return max(0, min([free, *cgroup_room(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))]))


@dataclass(frozen=True, slots=True)
class _Controller:
    """How a version of control groups names its numbers."""

    directory: str
    limit: str
    used: str
    cached: str
    """A key of memory.stat: of the bytes used, those of files, which are given up when memory is asked for."""


_VERSION_1 = _Controller("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _Controller("", "memory.max", "memory.current", "inactive_file")


def cgroup_room(memberships: Path, root: Path) -> list[int]:
    """Bytes up to the limit of each control group that has one: this process's and those around it.

    memberships: /proc/self/cgroup. root: where the groups are mounted. Empty where there are no control groups.
    """
    try:
        lines = [line.split(":", 2) for line in memberships.read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, name in lines:
        if controllers in ("", "memory"):
            controller = _VERSION_1 if controllers else _VERSION_2
            group = Path(name.lstrip("/"))
            around = [root / controller.directory / part for part in (group, *group.parents)]
            found += [room for directory in around if (room := _room(directory, controller)) is not None]
    return found


def _room(group: Path, names: _Controller) -> int | None:
    try:
        limit, used = (int((group / name).read_text()) for name in (names.limit, names.used))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return limit - used + int(stat[names.cached])
    except (OSError, ValueError, KeyError):  # no such group here, or "max": without a limit
        return None
