"""Where `datasets` keeps the checked copies of data files, which it maps into memory, and when they are removed.

They lie in a directory of the user below the system's temporary one (TMPDIR), and are as large as the files' text. A
copy is shared by all processes of a machine that read the same files; the last of them removes it. What a killed
process leaves behind is removed at the next start. With HF_DATASETS_CACHE set the copies lie there, and stay."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from megatron_gil.config import ConfigError


def take_copy(key: str) -> tuple[Path, Callable[[], None]]:
    """(the directory of the copy that is known by `key`, what to call when it is no longer read)."""
    kept = os.environ.get("HF_DATASETS_CACHE")
    if kept:
        return Path(kept), lambda: None
    root = _own_directory()
    descriptor = _hold(root / f"{key}.lock")
    for lock in root.glob("*.lock"):
        if lock.stem != key:
            _remove_unread(root, lock)
    return root / key, lambda: _release(root, key, descriptor)


def _own_directory() -> Path:
    root = Path(tempfile.gettempdir()) / f"megatron_gil-{os.getuid()}"
    try:
        root.mkdir(mode=0o700, exist_ok=True)
        owner = root.stat().st_uid
    except OSError as error:
        raise ConfigError(_cannot(root, error)) from None
    if owner != os.getuid():
        raise ConfigError(f"{root} belongs to another user; set TMPDIR or HF_DATASETS_CACHE to a directory of yours")
    return root


def cannot_copy(files: list[str], directory: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{', '.join(files)}: {_cannot(directory, error)}")


def _cannot(directory: Path, error: OSError) -> str:
    return (
        f"{directory}: no checked copy of the data can be written ({error.strerror or error}); make room there, or set "
        "TMPDIR or HF_DATASETS_CACHE to another directory"
    )


def _hold(lock: Path) -> int:
    """A descriptor that holds the lock together with other readers. It is checked to be of the file that lies there
    now, because a last reader may be removing the file at this moment."""
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(_cannot(lock.parent, error)) from None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if _lies_at(lock, descriptor):
            return descriptor
        os.close(descriptor)


def _lies_at(lock: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(lock.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _release(root: Path, key: str, descriptor: int) -> None:
    os.close(descriptor)
    _remove_unread(root, root / f"{key}.lock")


def _remove_unread(root: Path, lock: Path) -> None:
    """Removes the copy whose lock nobody holds."""
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _lies_at(lock, descriptor):
            shutil.rmtree(root / lock.stem, ignore_errors=True)
            lock.unlink(missing_ok=True)
    except OSError:  # a reader holds it
        return
    finally:
        os.close(descriptor)
