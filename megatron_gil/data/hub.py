"""Names on the Hugging Face Hub in the place of paths: OWNER/NAME, OWNER/NAME@REVISION, and of data
OWNER/NAME[@REVISION]:FILES.

The files lie in the cache of huggingface_hub, whose variables hold: HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT.
As a program it brings one name into the cache, which a run does beside itself so that a stop need not wait for a
download:

    python -m megatron_gil.data.hub KIND KEY NAME
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

from megatron_gil.config import ConfigError

Kind = Literal["model", "config", "tokenizer", "dataset"]

DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
PATTERNS: dict[Kind, list[str]] = {
    "model": ["*.json", "model*.safetensors", "tokenizer.model", "*.jinja"],
    "config": ["config.json"],
    "tokenizer": ["*.json", "tokenizer.model", "*.jinja"],
}
"""What is read of a repository's first level; folders hold the same weights in other forms."""
NEEDED: dict[Kind, dict[str, str]] = {
    "model": {"a config.json": "config.json", "weights in model*.safetensors": "model*.safetensors"},
    "config": {"a config.json": "config.json"},
    "tokenizer": {"a tokenizer.json or tokenizer.model": "tokenizer.[jm]*"},
}
"""Of these: in words, and as a pattern."""
_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?(?::([^:]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubName:
    repo: str
    revision: str = ""
    """A branch, a tag or a commit; empty: the default branch."""
    files: str = ""
    """Of data: a file, a folder or a pattern in the repository."""

    @classmethod
    def parse(cls, value: str) -> Self | None:
        """None for a path. Whatever exists is one, and without a revision or files also what lies in a directory that
        exists, or is called as data files are: a mistyped path is not looked for elsewhere."""
        found = _NAME.fullmatch(value)
        if found is None or Path(value).exists():
            return None
        repo, revision, files = (part or "" for part in found.groups())
        if not (revision or files) and (Path(value).parent.is_dir() or value.endswith(DATA_SUFFIXES)):
            return None
        return cls(repo=repo, revision=revision, files=files)

    @property
    def is_pinned(self) -> bool:
        """Whether its revision is a commit."""
        return _COMMIT.fullmatch(self.revision) is not None

    def __str__(self) -> str:
        return self.repo + f"@{self.revision}" * bool(self.revision) + f":{self.files}" * bool(self.files)


def located(value: str, kind: Kind, key: str) -> Path:
    """The path that a key names; of a name with its commit, the place in the cache."""
    name = HubName.parse(value)
    return Path(value) if name is None or not name.is_pinned else cached(name, kind, key)


def fetched(value: str, kind: Kind, key: str) -> Path:
    """The path that a command's argument names; of a name on the Hub, the place in the cache, brought there where it is
    not."""
    name = HubName.parse(value)
    return Path(value) if name is None else cached(fetch(name, kind, key), kind, key)


def cached(name: HubName, kind: Kind, key: str) -> Path:
    """Where the files lie. ConfigError where the cache has not all of them."""
    snapshot = _snapshot(name, kind, key, local_files_only=True)
    if kind == "dataset":
        return snapshot / name.files
    for what, pattern in NEEDED[kind].items():
        if not any(snapshot.glob(pattern)):
            raise ConfigError(
                f"{key}={name}: {snapshot} holds no {what}; the repository has none, or only a part of it was "
                f"downloaded: `{_command(name, kind)}` gets the rest"
            )
    return snapshot


def fetch(name: HubName, kind: Kind, key: str) -> HubName:
    """Bring the files into the cache; the name with its commit. ConfigError, in one line, for whatever stands in the
    way."""
    if kind != "dataset" and name.files:
        raise ConfigError(f"{key}={name}: a model is a whole repository; leave out :{name.files}")
    if kind == "dataset" and not name.files:
        name = replace(name, files=_only_file(name, key))
    pinned = replace(name, revision=_snapshot(name, kind, key).name)
    cached(pinned, kind, key)
    return pinned


def _snapshot(name: HubName, kind: Kind, key: str, **options: Any) -> Path:
    """The directory in the cache, which is called as the commit is."""
    from huggingface_hub import snapshot_download  # takes a second

    return Path(
        _ask(
            name,
            kind,
            key,
            snapshot_download,
            allow_patterns=PATTERNS[kind] if kind in PATTERNS else [name.files, f"{name.files.rstrip('/')}/*"],
            ignore_patterns=["*/*"] if kind in PATTERNS else None,
            **options,
        )
    )


def _only_file(name: HubName, key: str) -> str:
    """The one data file of a repository. ConfigError lists them where there are several."""
    from huggingface_hub import HfApi, constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        snapshot = Path(_ask(name, "dataset", key, snapshot_download, allow_patterns=[]))
        files = [str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()]
    else:
        files = [file.rfilename for file in _ask(name, "dataset", key, HfApi().repo_info).siblings or ()]
    found = sorted(file for file in files if file.endswith(DATA_SUFFIXES))
    if len(found) == 1:
        return found[0]
    if not found:
        raise ConfigError(f"{key}={name}: holds no file that ends in {', '.join(DATA_SUFFIXES)}")
    shown = ", ".join(found[:6]) + f" and {len(found) - 6} more" * (len(found) > 6)
    raise ConfigError(
        f"{key}={name}: holds {len(found)} data files ({shown}); say which, as {key}={name}:FILES, a file, a folder or "
        "a pattern such as data/train-*.parquet"
    )


def _ask(name: HubName, kind: Kind, key: str, function: Any, **options: Any) -> Any:
    """What a function of huggingface_hub answers about a repository; ConfigError in its place of its own errors."""
    from huggingface_hub import errors

    where = f"https://huggingface.co/{'datasets/' * (kind == 'dataset')}{name.repo}"
    repo_type = "dataset" if kind == "dataset" else "model"
    try:
        return function(name.repo, revision=name.revision or None, repo_type=repo_type, **options)
    except errors.GatedRepoError:
        text = f"is gated; accept its terms on {where}, then `hf auth login`, or set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        text = (
            f"is no path here, and the Hub shows no {repo_type} of that name; correct it, or where it is private "
            "`hf auth login`, or set HF_TOKEN"
        )
    except errors.RevisionNotFoundError:
        text = f"has no revision {name.revision}; {where}/tree/main lists its branches and tags"
    except errors.LocalEntryNotFoundError:
        text = (
            "is no path here, is not (or not whole) in the Hub's cache, and the Hub cannot be reached or "
            f"HF_HUB_OFFLINE is set; where there is a network: `{_command(name, kind)}`"
        )
    except Exception as error:  # of the network, its proxies, the disk, and what the Hub answers
        text = f"cannot be had from the Hub: {' '.join(str(error).split()) or type(error).__name__:.300}"
    raise ConfigError(f"{key}={name} {text}")


def _command(name: HubName, kind: Kind) -> str:
    options = "--repo-type dataset " * (kind == "dataset") + f"--revision {name.revision} " * bool(name.revision)
    return f"hf download {options}{name.repo}" + " config.json" * (kind == "config")


def main(kind: str, key: str, value: str) -> int:
    """Prints the name with its commit, or why there is none, as a line of JSON."""
    name = HubName.parse(value)
    assert name is not None, value
    assert kind in get_args(Kind), kind
    try:
        print(json.dumps({"pinned": str(fetch(name, kind, key))}))  # type: ignore[arg-type]
    except ConfigError as error:
        print(json.dumps({"error": str(error)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
