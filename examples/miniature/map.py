"""The map: python examples/miniature/map.py --output runs/map

In each world of map.yaml: how far the SFT policy's reward can be followed, each method's eta on the tuning seeds, then
every method on the other seeds; last tables and pictures. What is finished is never run again, so a map that was
stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from cells import Place, read_grid, take_world
from map_tables import OPPONENT, REACH, write_map, write_numbers
from omegaconf import OmegaConf
from reach import read_trusted
from run import MAX_WORKERS, guarded, stage

from megatron_gil.config import ConfigError
from megatron_gil.demo.annotators import Annotators
from megatron_gil.demo.stages import Runner, Stage
from megatron_gil.evaluation.audit.targets import kl_targets, price_of, split_prompts
from megatron_gil.evaluation.report.runs import Json
from megatron_gil.jsonl import iter_jsonl

MAP = Path(__file__).with_name("map.yaml")
HALF_UPDATES = 90
"""Of the reward model, for the comparisons of easy prompts; those of hard ones need as many, times their multiple."""
SHARED = "sft_model"
"""Worlds differ in their annotators alone, so the SFT model of a seed is the same in all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What is compared in each world: a cell of map.yaml, or that cell with more settings."""

    label: str
    tuned: str | None
    """Its eta is the one at which the cells of this name, one an eta, have the most gold on the tuning seeds."""
    like: str
    """Name of the cell that it is a variant of; without its eta, where that is tuned."""
    settings: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Map:
    tuning_seeds: Sequence[int]
    seeds: Sequence[int]
    methods: Mapping[str, Method]
    worlds: Mapping[str, Annotators]


def read_map(
    worlds: str = "map",
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    tuning_seeds: Sequence[int] | None = None,
) -> Map:
    """worlds: name of one of the sets of worlds in map.yaml. The others: what is to run in the place of all."""
    tree: Any = OmegaConf.to_container(OmegaConf.load(MAP))
    if worlds not in tree["worlds"]:
        raise ConfigError(f"--worlds {worlds}: {MAP} has {', '.join(tree['worlds'])}")
    if unknown := sorted(set(methods or ()) - set(tree["methods"])):
        raise ConfigError(f"--methods {' '.join(unknown)}: {MAP} has {', '.join(tree['methods'])}")
    return Map(
        tuning_seeds=tuning_seeds or tree["tuning_seeds"],
        seeds=seeds or tree["seeds"],
        methods={
            name: Method(
                label=entry["label"],
                tuned=entry.get("tuned"),
                like=entry.get("like", entry.get("tuned")),
                settings=entry.get("set", []),
            )
            for name, entry in tree["methods"].items()
            if methods is None or name in (OPPONENT, *methods)
        },
        worlds={name: Annotators(**entry) for name, entry in tree["worlds"][worlds].items()},
    )


def method_labels() -> dict[str, str]:
    """Of all methods, by name."""
    return {name: method.label for name, method in read_map().methods.items()}


class World:
    """One world's cells; its methods are known once its tuning seeds have run."""

    def __init__(self, directory: Path, annotators: Annotators, drawn: Map) -> None:
        self.name, self._directory, self._annotators, self._map = directory.name, directory, annotators, drawn

    @property
    def grid(self) -> Path:
        return self._directory / "grid.yaml"

    def prepare(self, seeds: Sequence[int]) -> None:
        """Write its files."""
        self._write_grid({})
        for seed in seeds:
            take_world(self._directory / f"seed_{seed}", seed, self._annotators)

    def link_shared(self, first: World, seed: int) -> None:
        ours, theirs = (world.place(SHARED, seed).cell_dir for world in (self, first))
        if ours != theirs and not ours.exists():
            ours.symlink_to(os.path.relpath(theirs, ours.parent))

    def place(self, cell: str, seed: int) -> Place:
        return Place(output=self._directory, seed=seed, cell=self._cells[cell])

    def stages(self, cells: Iterable[str], seeds: Sequence[int]) -> list[Stage]:
        """What is to run, a cell's seeds one after the other."""
        places = [self.place(cell, seed) for cell in cells for seed in seeds]
        for place in places:
            place.take()
        return [stage(place, self.grid, self.name) for place in places]

    def tuned_cells(self) -> list[str]:
        """Those among which an eta is chosen."""
        families = {method.tuned for method in self._map.methods.values() if method.tuned}
        return [name for name in self._cells if name.rpartition("_")[0] in families]

    def choose(self) -> dict[str, str]:
        """Method -> its cell, which the world's file then has; from the finished cells of the tuning seeds."""
        added: dict[str, Any] = {}
        chosen: dict[str, str] = {}
        for name, method in self._map.methods.items():
            if method.tuned:
                eta = self._best_eta(method.tuned)
                chosen[name], like, settings = f"{name}_{eta}", f"{method.like}_{eta}", list(method.settings)
            else:
                targets = self._targets()
                chosen[name] = "_".join([name, *(f"{v:g}" for key, v in targets.items() if "target" in key)])
                like = method.like
                settings = [*method.settings, *(f"{key}={value:g}" for key, value in targets.items())]
            if chosen[name] != like:
                added[chosen[name]] = {"label": method.label, "command": "ppo", "like": like, "set": settings}
        self._write_grid(added)
        return chosen

    def _best_eta(self, family: str) -> str:
        cells = [name for name in self.tuned_cells() if name.rpartition("_")[0] == family]
        best = max(cells, key=lambda cell: fmean(self.numbers(cell, seed)["gold"] for seed in self._map.tuning_seeds))
        return best.rpartition("_")[2]

    def _targets(self) -> Mapping[str, float]:
        """Those that an audit names where all prompts of the tuning seeds are trusted rows."""
        rows = [row for seed in self._map.tuning_seeds for row in read_trusted(self.place(REACH, seed).replies)]
        groups = split_prompts(rows)
        assert groups is not None
        return kl_targets(price_of(groups))

    def numbers(self, cell: str, seed: int) -> dict[str, float]:
        """Of a finished cell."""
        return {row["metric"]: row["value"] for _, row in iter_jsonl(self.place(cell, seed).rows)}

    def _write_grid(self, cells: Mapping[str, Any]) -> None:
        hard = self._annotators.hard_comparisons
        tree = {
            "base": str(MAP),
            "annotators": asdict(self._annotators),
            "iterations": {"reward": round(HALF_UPDATES * (1 + hard))},
            "cells": dict(cells),
        }
        self._directory.mkdir(parents=True, exist_ok=True)
        self.grid.write_text(OmegaConf.to_yaml(OmegaConf.create(tree)), encoding="utf-8")
        self._cells = read_grid(self.grid)


def run_map(drawn: Map, output: Path, workers: int) -> list[Json]:
    """Run what is not finished; a row for each world, seed, method and metric."""
    worlds = [World(output / name, annotators, drawn) for name, annotators in drawn.worlds.items()]
    tuning, seeds = drawn.tuning_seeds, drawn.seeds
    every = [*tuning, *seeds]
    progress = Lines()
    worker = [str(Path(__file__).with_name("cell.py"))]
    runner = Runner(output / "logs", worker=worker, workers=workers, show=progress.show)

    def run(what: str, stages: Sequence[Stage]) -> None:
        progress.start(what, stages)
        runner.run_all(stages)

    for world in worlds:
        world.prepare(every)
    run("SFT models", worlds[0].stages([SHARED], every))
    for world in worlds:
        for seed in every:
            world.link_shared(worlds[0], seed)
    run("reward models", [s for world in worlds for s in world.stages(["reward"], every)])
    run("best of n", [s for world in worlds for s in world.stages([REACH, "sft"], every)])
    run("tuning", [s for world in worlds for s in world.stages(world.tuned_cells(), tuning)])
    chosen = [(world, world.choose()) for world in worlds]
    run("methods", [s for world, cells in chosen for s in world.stages(cells.values(), seeds)])
    shown = {REACH: REACH, "sft": "sft"}
    return [
        {"world": world.name, "seed": seed, "method": method, "cell": cell, "metric": metric, "value": value}
        for world, cells in chosen
        for method, cell in (shown | cells).items()
        for seed in seeds
        for metric, value in world.numbers(cell, seed).items()
    ]


class Lines:
    """A line on standard error for each cell that finishes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def start(self, what: str, stages: Sequence[Stage]) -> None:
        self._left = {stage.name for stage in stages if not stage.product.exists()}
        self._total, self._started = len(self._left), time.monotonic()
        print(f"{what}: {len(stages)} cells, {self._total} to run", file=sys.stderr)

    def show(self, stage: Stage, done: int) -> None:
        with self._lock:
            if stage.name not in self._left or done < stage.num_iterations or not stage.product.exists():
                return
            self._left.remove(stage.name)
            minutes = (time.monotonic() - self._started) / 60
            count = self._total - len(self._left)
            left = minutes / count * len(self._left)
            print(f"{stage.name} done ({count} of {self._total}, {left:.0f} minutes left)", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 all finished, 1 a cell failed, 2 wrong arguments, 75 stopped."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/map"), metavar="DIR")
    parser.add_argument("--worlds", default="map", metavar="NAME", help="a set of worlds of map.yaml (default: map)")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="some of the methods (PPO w/ KL is always there)")
    parser.add_argument("--seeds", type=int, nargs="+", help="in the place of those in map.yaml")
    parser.add_argument("--tuning-seeds", type=int, nargs="+", help="in the place of those in map.yaml")
    parser.add_argument("--workers", type=int, choices=range(1, MAX_WORKERS + 1), default=MAX_WORKERS)
    parser.add_argument("--results", type=Path, metavar="DIR", help="tables and pictures go there, not to --output")
    arguments = parser.parse_args(argv)
    return guarded(lambda: _run_and_write(arguments))


def _run_and_write(arguments: argparse.Namespace) -> int:
    drawn = read_map(arguments.worlds, arguments.methods, arguments.seeds, arguments.tuning_seeds)
    rows = run_map(drawn, arguments.output.absolute(), arguments.workers)
    results = arguments.results or arguments.output / "results"
    results.mkdir(parents=True, exist_ok=True)
    write_numbers(results / f"{arguments.worlds}.csv.gz", rows)
    write_map(results, method_labels())
    return 0


if __name__ == "__main__":
    sys.exit(main())
