"""Files of a checkpoint on disk: written now or in a thread, synced, and checked against a manifest."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_gil.paths import write_whole

MANIFEST = "manifest.json"

Entry = dict[str, Any]
"""{"size": bytes, "sha256": hexadecimal digest} of a file."""


class FileWriter:
    """Writes this rank's files of one checkpoint, in order. An error is kept, not raised: ranks must meet first."""

    def __init__(self, *, background: bool) -> None:
        """background: write nothing before `start`, then in a thread; what is to be written stays in memory."""
        self._background, self._jobs = background, list[tuple[Path, Callable[[Path], object]]]()
        self._thread = threading.Thread(target=self._work, name="checkpoint")
        self.entries: dict[Path, Entry] = {}
        self.error = ""

    def tensors(self, path: Path, tensors: dict[str, Tensor]) -> None:
        self._add(path, lambda where: save_file(tensors, where, metadata={"format": "pt"}))

    def text(self, path: Path, text: str) -> None:
        self._add(path, lambda where: where.write_text(text, encoding="utf-8"))

    def content(self, path: Path, content: bytes) -> None:
        self._add(path, lambda where: where.write_bytes(content))

    def start(self) -> None:
        """No more files come."""
        if self._background:
            self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        if self._background:
            self._thread.join()

    def _add(self, path: Path, write: Callable[[Path], object]) -> None:
        self._jobs.append((path, write))
        if not self._background:
            self._work()

    def _work(self) -> None:
        while self._jobs:
            path, write = self._jobs.pop(0)
            if self.error:
                continue
            try:
                write(path)
                sync(path)
                self.entries[path] = digest(path)
            except (OSError, SafetensorError, MemoryError) as error:
                self.error = f"{path}: {reason(error)}"


def reason(error: Exception) -> str:
    """What the system said, in a few words."""
    text = error.strerror if isinstance(error, OSError) else str(error)
    return " ".join((text or type(error).__name__).split())


def digest(path: Path) -> Entry:
    with path.open("rb") as file:
        return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def sync(path: Path) -> None:
    """The file, or the names in the directory, are on disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """The file on disk, or an exception; never half of it under its name."""
    write_whole(path, text)


def write_manifest(directory: Path, entries: dict[str, Entry]) -> None:
    """The last file of a checkpoint: until it is there, there is none."""
    write_text(directory / MANIFEST, json.dumps(dict(sorted(entries.items())), indent=1))
    for path in (*(p for p in directory.iterdir() if p.is_dir()), directory):
        sync(path)


def read_manifest(directory: Path) -> dict[str, tuple[int, str]] | None:
    """name -> (size, digest); None where it is missing or unreadable."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        return {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
