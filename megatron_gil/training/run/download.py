"""Downloading what a config names on the Hugging Face Hub: on each node one rank does, and rank 0 before the others;
where nodes share the cache, that is once."""

from __future__ import annotations

import json
import subprocess
import sys
import time

from megatron_gil.config import ConfigError
from megatron_gil.data.hub import HubName, Kind, cached
from megatron_gil.parallel.collectives import agree, any_rank, broadcast_object
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.training.hub_names import Config, names_of, with_pins
from megatron_gil.training.run.progress import Progress

POLL_S = 0.5


def pin_names(config: Config, layout: ParallelLayout, progress: Progress) -> Config:
    """The config with a commit in every name, whose files are in this node's cache. Collective; a stop ends it."""
    wanted = agree(layout, lambda: names_of(config) if layout.is_main else {})
    pins = {}
    for key, (name, kind) in broadcast_object(wanted, layout).items():
        phase = f"downloading {key}"
        pinned = broadcast_object(_fetch(layout.is_main, name, kind, key, phase, layout, progress), layout)
        _fetch(layout.local_rank == 0, pinned, kind, key, phase, layout, progress)
        agree(layout, lambda pinned=pinned, kind=kind, key=key: cached(pinned, kind, key))
        pins[key] = str(pinned)
    return with_pins(config, pins)


def _fetch(
    here: bool, name: HubName, kind: Kind, key: str, phase: str, layout: ParallelLayout, progress: Progress
) -> HubName | None:
    """fetch() in a process of its own on the ranks that are `here`, while all wait and stops are taken."""
    child = _begin(name, kind, key) if here and not _is_cached(name, kind, key) else None
    try:
        while any_rank(child is not None and child.poll() is None, layout):
            progress.safe_point(phase)
            time.sleep(POLL_S)
    finally:
        if child is not None:
            child.kill()  # what is half-way stays in the cache, and is gone on with
            child.wait()
    return agree(layout, lambda: name if child is None else _answer(child, name, key))


def _is_cached(name: HubName, kind: Kind, key: str) -> bool:
    try:
        return name.is_pinned and bool(cached(name, kind, key))
    except ConfigError:
        return False


def _begin(name: HubName, kind: Kind, key: str) -> subprocess.Popen[str]:
    """In a session of its own: a Ctrl-C is the run's to take."""
    command = [sys.executable, "-m", "megatron_gil.data.hub", kind, key, str(name)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def _answer(child: subprocess.Popen[str], name: HubName, key: str) -> HubName:
    said = child.communicate()[0].strip().rpartition("\n")[2]
    try:
        answer = json.loads(said)
    except ValueError:
        text = f"the download ended with exit code {child.returncode}; start again to go on with it"
        raise ConfigError(f"{key}={name}: {text}") from None
    if "error" in answer:
        raise ConfigError(answer["error"])
    pinned = HubName.parse(answer["pinned"])
    assert pinned is not None, answer
    return pinned
