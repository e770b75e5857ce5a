"""From what a user names (a model directory, a checkpoint, a run) to the directory of one model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from megatron_gil.config import ConfigError

Role = Literal["policy", "reward", "critic"]

ROLE_DIRECTORIES: dict[Role, str] = {"policy": "policy", "reward": "reward_model", "critic": "critic"}


def find_model(path: Path, role: Role | None, note: Callable[[str], None]) -> Path:
    """The directory of a model: `path` itself if it holds a config.json, else the role's directory in the checkpoint
    `path`, else that in the newest good checkpoint of the run `path`.

    role None: the policy, or the only model there is. note: called with a line for each damaged checkpoint.
    """
    if (path / "config.json").is_file():
        return path
    if (path / "manifest.json").is_file() or path.name.startswith("iter_"):
        model = _role_directory(path, role)
        damage = find_damage(path, model)
        if damage:
            raise ConfigError(f"{path}: {damage}; take another checkpoint")
        return model
    checkpoints = sorted(path.glob("checkpoints/iter_*"), key=lambda p: (len(p.name), p.name), reverse=True)
    for checkpoint in checkpoints:
        model = _role_directory(checkpoint, role)
        damage = find_damage(checkpoint, model)
        if damage is None:
            return model
        note(f"{checkpoint}: {damage}; trying the one before it")
    if checkpoints:
        raise ConfigError(f"{path}: none of its {len(checkpoints)} checkpoint(s) is whole")
    raise ConfigError(f"{path}: holds neither config.json nor checkpoints; give a model, checkpoint or run directory")


def find_damage(checkpoint: Path, model: Path) -> str | None:
    """How the files of one model differ from the checkpoint's manifest (sizes and SHA-256); None if they do not."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        expected = {checkpoint / name: (entry["size"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "manifest.json is missing or unreadable"
    files = [file for file in expected if file.parent == model]
    for file in files:
        if not file.is_file() or file.stat().st_size != expected[file][0]:
            return f"{file.relative_to(checkpoint)} is missing or not of {expected[file][0]} bytes"
    with ThreadPoolExecutor() as threads:
        digests = list(threads.map(_sha256, files))
    for file, digest in zip(files, digests, strict=True):
        if digest != expected[file][1]:
            return f"{file.relative_to(checkpoint)} differs from its checksum"
    return None if files else f"manifest.json lists no files of {model.name}"


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
