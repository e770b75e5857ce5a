"""One writer at a time: a file beside what is written names the process that writes it.

Not `flock`, which some shared file systems ignore. A holder on this machine is looked up by its process id and the time
when that process started, so that a killed one is known at once. One on another machine is known by its heartbeat, the
file's time of change: silent for SILENCE_S, it is dead. Where that is not yet known, a start waits until it is.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil

from megatron_gil.config import ConfigError

BEAT_S = 10.0
SILENCE_S = 120.0
POLL_S = 0.2

Life = Literal["alive", "dead", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A process that holds a lock."""

    host: str
    process: int
    since: str
    """When it took the lock, UTC."""
    machine: str
    """Boot and process namespace: only within one of them does a process id mean anything."""
    started: str
    """When the process started, as its system counts: tells it from a later one with its id."""
    token: str

    @classmethod
    def here(cls) -> Holder:
        return cls(
            host=socket.gethostname(),
            process=os.getpid(),
            since=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            machine=_machine(),
            started=_start_of(os.getpid()),
            token=uuid.uuid4().hex,
        )

    def life(self) -> Life:
        """unknown: on another machine, or killed and not yet gone."""
        if self.machine != _machine():
            return "unknown"
        if _start_of(self.process) != self.started:
            return "dead"
        return "unknown" if _is_dying(self.process) else "alive"


@dataclass(frozen=True, slots=True)
class _Look:
    """What stood at a lock's place at one moment."""

    content: bytes
    beat: int

    @property
    def holder(self) -> Holder | None:
        """None for a file that is being written, or that holds something else."""
        try:
            return Holder(**json.loads(self.content))
        except (ValueError, TypeError):
            return None

    def __str__(self) -> str:
        holder = self.holder
        return f"process {holder.process} on {holder.host} since {holder.since}" if holder else "a process unknown"


class FileLock:
    """A lock that is held, until `release` or the end of the process."""

    def __init__(self, path: Path, content: bytes, what: str) -> None:
        self._path, self._content, self._what = path, content, what
        self._released = threading.Event()
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    @classmethod
    def take(
        cls, path: Path, what: str, *, stopping: Callable[[], bool] = lambda: False, patience_s: float = SILENCE_S
    ) -> FileLock | None:
        """The lock; None if `stopping` became true while it was not known whether the holder lives.

        what: names in messages what the lock is for. patience_s: the longest wait. Raises ConfigError where another
        process holds it, and OSError.
        """
        content = json.dumps(asdict(Holder.here())).encode() + b"\n"
        first, silent_at_first, seen = None, 0.0, 0.0
        began = time.monotonic()
        while True:
            look = _look(path)
            if look is None:
                if _create(path, content):
                    return cls(path, content, what)
                continue
            if first is None or look.content != first.content:
                first, silent_at_first, seen = look, _age(path, look), time.monotonic()
            life = look.holder.life() if look.holder else "unknown"
            silent_s = silent_at_first + time.monotonic() - seen
            if life == "alive" or look.beat != first.beat:
                raise ConfigError(f"{what} is in use by {look}; wait for its end, or choose another")
            if life == "dead" or silent_s > SILENCE_S:
                if _replace(path, look, content):
                    return cls(path, content, what)
                continue
            if stopping():
                return None
            if time.monotonic() - began > patience_s:
                raise ConfigError(
                    f"{what} was in use by {look}, silent for {silent_s:.0f} s, and counts as dead only after "
                    f"{SILENCE_S:.0f} s; start again then, or remove {path} if you know that it is"
                )
            if look is first:
                wait_s = min(patience_s, SILENCE_S - silent_s)
                print(f"{what} was in use by {look}; waiting up to {wait_s:.0f} s for a sign of it", file=sys.stderr)
            time.sleep(POLL_S)

    def release(self) -> None:
        self._released.set()
        look = _look(self._path)
        if look is not None and look.content == self._content:
            self._path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._released.wait(BEAT_S):
            try:
                look = _look(self._path)
                if look is not None and look.content != self._content:
                    self._give_way(look)
                os.utime(self._path)
            except OSError:
                continue  # a file system that does not answer, or a directory that is gone: a save will say so

    def _give_way(self, look: _Look) -> None:
        """This process was silent so long that another one took over: nothing more may be written."""
        sys.stderr.write(f"megatron-gil: {self._what} was taken over by {look}, as this process was silent; it ends\n")
        sys.stderr.flush()
        os._exit(1)


def _look(path: Path) -> _Look | None:
    """None where there is no file. Opening it makes NFS ask the server."""
    try:
        with path.open("rb") as file:
            return _Look(file.read(10_000), os.fstat(file.fileno()).st_mtime_ns)
    except FileNotFoundError:
        return None


def _create(path: Path, content: bytes) -> bool:
    """Whether the file was made: it is not if there is one."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def _replace(path: Path, dead: _Look, content: bytes) -> bool:
    """Put our content in the place of a dead holder's; False if another process was faster.

    Whoever makes the claim beside it, which is named for the dead holder, may look once more and replace.
    """
    claim = path.with_name(f"{path.name}.{dead.holder.token if dead.holder else 'unknown'}")
    if not _create(claim, content):
        claimed = _look(claim)
        if claimed is not None and _age(claim, claimed) > SILENCE_S:
            claim.unlink(missing_ok=True)  # its maker died within these lines
        time.sleep(POLL_S)
        return False
    try:
        if _look(path) != dead:
            return False
        beside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        beside.write_bytes(content)
        beside.replace(path)
        return True
    finally:
        claim.unlink(missing_ok=True)


def _age(path: Path, look: _Look) -> float:
    """Seconds since the last beat by the clock of the file system, which another machine's beat was set by."""
    probe = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        probe.touch()
        return (probe.stat().st_mtime_ns - look.beat) / 1e9
    finally:
        probe.unlink(missing_ok=True)


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def _start_of(process: int) -> str:
    """When a process started, in its system's own count; empty for one that does not run any more."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]  # ticks since the boot
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
    try:
        return f"{psutil.Process(process).create_time():.2f}"
    except psutil.Error:
        return ""


def _is_dying(process: int) -> bool:
    """Whether a SIGKILL has been sent to it: freeing a large memory takes a while."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        flags = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[6])
    except OSError:
        return False
    pending = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigPnd", "ShdPnd"))]
    return bool(flags & 0x4) or any(mask >> 8 & 1 for mask in pending)  # PF_EXITING; bit 8 is SIGKILL
