"""From what a user names (a model directory, a checkpoint, a run) to the directory of one model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeVar

from megatron_gil.config import ConfigError

Role = Literal["policy", "reward", "critic"]
Result = TypeVar("Result")

ROLE_DIRECTORIES: dict[Role, str] = {"policy": "policy", "reward": "reward_model", "critic": "critic"}


class Damaged(ConfigError):
    """A weight file is not what its checkpoint's manifest says."""


Digests = Mapping[Path, str]
"""SHA-256 of the weight files of a model, as its checkpoint's manifest says; empty for a directory without one."""


def use_model(
    path: Path, role: Role | None, note: Callable[[str], None], use: Callable[[Path, Digests], Result]
) -> Result:
    """What `use` makes of a model: of the directory `path` itself if it holds a config.json, else of the role's in the
    checkpoint `path`, else of that in the newest good checkpoint of the run `path`.

    role None: the policy, or the only model there is. use: called with the directory and the digests of its weight
    files, which it reads only once, and compares; Damaged where one differs. All other files are proven before. note:
    called with a line for each damaged checkpoint.
    """
    if (path / "config.json").is_file():
        return use(path, {})
    if (path / "manifest.json").is_file() or path.name.startswith("iter_"):
        try:
            return _use(path, role, use)
        except Damaged as damage:
            raise ConfigError(f"{path}: {damage}; take another checkpoint") from None
    checkpoints = newest_checkpoints(path)
    for checkpoint in checkpoints:
        try:
            return _use(checkpoint, role, use)
        except Damaged as damage:
            note(f"{checkpoint}: {damage}; trying the one before it")
    if checkpoints:
        raise ConfigError(f"{path}: none of its {len(checkpoints)} checkpoint(s) is whole")
    raise ConfigError(f"{path}: holds neither config.json nor checkpoints; give a model, checkpoint or run directory")


def newest_checkpoints(run: Path) -> list[Path]:
    """Those of a run directory, the newest first, none of them proven."""
    return sorted(run.glob("checkpoints/iter_*"), key=lambda p: (len(p.name), p.name), reverse=True)


def find_model(path: Path, role: Role | None, note: Callable[[str], None]) -> Path:
    """The directory that `use_model` would take, every file of it proven."""

    def prove(model: Path, digests: Digests) -> Path:
        check_digests(digests)
        return model

    return use_model(path, role, note, prove)


def check_digests(digests: Digests) -> None:
    """Damaged if a file differs; several are read at a time."""
    with ThreadPoolExecutor() as threads:
        found = list(threads.map(_sha256, digests))
    for (file, expected), digest in zip(digests.items(), found, strict=True):
        check_digest(file, digest, expected)


def check_digest(file: Path, found: str, expected: str) -> None:
    """Damaged unless they are the same."""
    if found != expected:
        raise Damaged(f"{file.parent.name}/{file.name} differs from its checksum")


def _use(checkpoint: Path, role: Role | None, use: Callable[[Path, Digests], Result]) -> Result:
    """Of one checkpoint. What is refused may be so because of a damage, which is then what is said."""
    model = _role_directory(checkpoint, role)
    digests = _read_digests(checkpoint, model)
    weights = {file: digest for file, digest in digests.items() if file.suffix == ".safetensors"}
    check_digests({file: digest for file, digest in digests.items() if file not in weights})
    try:
        return use(model, weights)
    except Damaged:
        raise
    except ConfigError:
        check_digests(weights)
        raise


def _read_digests(checkpoint: Path, model: Path) -> Digests:
    """Of all files of a model, which have the sizes that the manifest says."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        expected = {checkpoint / name: (entry["size"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damaged("manifest.json is missing or unreadable") from None
    found = {file: (size, digest) for file, (size, digest) in expected.items() if file.parent == model}
    for file, (size, _) in found.items():
        if not file.is_file() or file.stat().st_size != size:
            raise Damaged(f"{file.relative_to(checkpoint)} is missing or not of {size} bytes")
    if not found:
        raise Damaged(f"manifest.json lists no files of {model.name}")
    return {file: digest for file, (_, digest) in found.items()}


def _role_directory(checkpoint: Path, role: Role | None) -> Path:
    present = [name for name in ROLE_DIRECTORIES.values() if (checkpoint / name / "config.json").is_file()]
    if role is not None:
        wanted = ROLE_DIRECTORIES[role]
    else:
        wanted = "policy" if "policy" in present or len(present) != 1 else present[0]
    if wanted not in present:
        raise ConfigError(
            f"{checkpoint}: holds no {wanted}, only {', '.join(present) or 'no model at all'}; name another --role"
        )
    return checkpoint / wanted


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
