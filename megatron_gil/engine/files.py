"""Files of a checkpoint on disk: written now or in a thread, synced, and checked against a manifest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_gil.paths import sync, write_whole

MANIFEST = "manifest.json"
CHUNK_BYTES = 1 << 18

Entry = dict[str, Any]
"""{"size": bytes, "sha256": hexadecimal digest} of a file."""


class FileWriter:
    """Writes and digests this rank's files of one checkpoint, one after the other. An error is kept, not raised: ranks
    must meet first."""

    def __init__(self, *, background: bool) -> None:
        """background: write nothing before `start`, then in a thread; what is to be written stays in memory."""
        self.background = background
        self._jobs = deque[tuple[Path, Callable[[], object]]]()
        self._thread = threading.Thread(target=self._work, name="checkpoint")
        self._file: _OpenFile | None = None
        self.entries: dict[Path, Entry] = {}
        self.error = ""

    def begin(self, path: Path) -> None:
        """What is appended from here on goes into this file, until it is ended."""
        self._path = path
        self._add(partial(self._begin, path))

    def append(self, content: bytes | Tensor) -> None:
        """A tensor is a contiguous one in host memory. In the background nobody may write into it any more."""
        self._add(partial(self._append, content))

    def end(self) -> None:
        self._add(self._end)

    def text(self, path: Path, text: str) -> None:
        self.content(path, text.encode())

    def content(self, path: Path, content: bytes) -> None:
        self.begin(path)
        self.append(content)
        self.end()

    def start(self) -> None:
        """No more files come."""
        if self.background:
            self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        if self.background:
            self._thread.join()

    def _add(self, act: Callable[[], object]) -> None:
        self._jobs.append((self._path, act))
        if not self.background:
            self._work()

    def _work(self) -> None:
        while self._jobs:
            path, act = self._jobs.popleft()
            if self.error:
                continue
            try:
                act()
            except (OSError, MemoryError) as error:
                self.error = f"{path}: {reason(error)}"
                self._abandon()

    def _begin(self, path: Path) -> None:
        self._file = _OpenFile(path, path.open("wb"), hashlib.sha256())

    def _append(self, content: bytes | Tensor) -> None:
        assert self._file is not None
        self._file.write(_bytes(content))

    def _end(self) -> None:
        assert self._file is not None
        self.entries[self._file.path] = self._file.close()
        self._file = None

    def _abandon(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # it may try to write what the disk refused
                self._file.file.close()
            self._file = None


@dataclass(slots=True)
class _OpenFile:
    path: Path
    file: BinaryIO
    sha256: Any
    size: int = 0

    def write(self, content: memoryview) -> None:
        for start in range(0, len(content), CHUNK_BYTES):
            chunk = content[start : start + CHUNK_BYTES]  # small enough to be still in the cache when it is written
            self.sha256.update(chunk)
            self.file.write(chunk)
        self.size += len(content)

    def close(self) -> Entry:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {"size": self.size, "sha256": self.sha256.hexdigest()}


def _bytes(content: bytes | Tensor) -> memoryview:
    if isinstance(content, bytes):
        return memoryview(content)
    return content.flatten().view(torch.uint8).numpy().data


def reason(error: Exception) -> str:
    """What the system said, in a few words."""
    text = error.strerror if isinstance(error, OSError) else str(error)
    return " ".join((text or type(error).__name__).split())


def digest(path: Path) -> Entry:
    with path.open("rb") as file:
        return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_manifest(directory: Path, entries: dict[str, Entry]) -> None:
    """The last file of a checkpoint: until it is there, there is none."""
    write_whole(directory / MANIFEST, json.dumps(dict(sorted(entries.items())), indent=1))
    for path in (*(p for p in directory.iterdir() if p.is_dir()), directory):
        sync(path)


def read_manifest(directory: Path) -> dict[str, tuple[int, str]] | None:
    """name -> (size, digest); None where it is missing or unreadable."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        return {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
