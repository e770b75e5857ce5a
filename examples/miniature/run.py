"""The whole grid: python examples/miniature/run.py --output runs/miniature

Every method of grid.yaml on every seed, two cells at a time, then the tables and pictures. What is finished is
never run again, so a grid that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from cells import GRID, NEEDED, Cell, Place, read_annotators, read_grid, take_world
from rich.console import Console
from rich.live import Live
from rich.table import Table

from megatron_gil.config import ConfigError
from megatron_gil.demo.stages import Runner, Stage, StageFailed

MAX_WORKERS = 2
STOPPED = 75
WAVES = (("sft_model",), ("reward", "reward_longer", "dpo"))
"""What later cells need; all others follow in one wave."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 all finished, 1 a cell failed, 2 wrong arguments, 75 stopped."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/miniature"), metavar="DIR")
    parser.add_argument("--grid", type=Path, default=GRID, metavar="FILE.yaml", help="the cells (default: grid.yaml)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--only", nargs="+", metavar="CELL", help="cells of grid.yaml (those they need are added)")
    parser.add_argument("--workers", type=int, choices=range(1, MAX_WORKERS + 1), default=MAX_WORKERS)
    parser.add_argument("--results", type=Path, metavar="DIR", help="tables and pictures go there, not to --output")
    arguments = parser.parse_args(argv)
    return guarded(lambda: _run_and_analyse(arguments))


def guarded(run: Callable[[], int]) -> int:
    """Its exit code; where it fails or is stopped, that is said in one line."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return run()
    except (ConfigError, StageFailed) as error:
        print(f"examples/miniature: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return STOPPED


def _run_and_analyse(arguments: argparse.Namespace) -> int:
    failures = run_grid(arguments, Console(stderr=True, highlight=False))
    for failure in failures:
        print(f"examples/miniature: {failure}", file=sys.stderr)
    from analyse import analyse

    analyse(arguments.output, arguments.results or arguments.output / "results", arguments.grid)
    return 1 if failures else 0


def run_grid(arguments: argparse.Namespace, console: Console) -> list[Exception]:
    """Run what is not finished; the failures."""
    output, seeds = arguments.output.absolute(), arguments.seeds
    cells = choose(read_grid(arguments.grid), arguments.only)
    places = [Place(output=output, seed=seed, cell=cell) for cell in cells.values() for seed in seeds]
    for place in places:
        place.take()
    for seed in seeds:
        take_world(output / f"seed_{seed}", seed, read_annotators(arguments.grid))
    with Progress(list(cells.values()), seeds, console) as progress:
        worker = [str(Path(__file__).with_name("cell.py"))]
        runner = Runner(output / "logs", worker=worker, workers=arguments.workers, show=progress.show)
        *needed, last = waves(places)
        for wave in needed:
            runner.run_all([stage(place, arguments.grid) for place in wave])
        return list(runner.run_all([stage(place, arguments.grid) for place in last], keep_going=True))


def choose(cells: dict[str, Cell], only: Sequence[str] | None) -> dict[str, Cell]:
    """All cells, or the named ones and what they need."""
    unknown = sorted(set(only or ()) - set(cells))
    if unknown:
        raise ConfigError(f"no cell is called {', '.join(unknown)}; the cells are {', '.join(cells)}")
    return {name: cell for name, cell in cells.items() if not only or name in (*only, *NEEDED)}


def waves(places: Sequence[Place]) -> list[list[Place]]:
    """Places in groups of which each needs the ones before it."""
    early = {name for names in WAVES for name in names}
    found = [[p for p in places if p.cell.name in names] for names in WAVES]
    return [*found, [p for p in places if p.cell.name not in early]]


def stage(place: Place, grid: Path, world: str = "") -> Stage:
    where = ["--grid", str(grid), "--output", str(place.output), "--seed", str(place.seed), "--cell", place.cell.name]
    return Stage(
        name=f"{world} {place.cell.name} seed {place.seed}".strip(),
        arguments=where,
        product=place.rows,
        run_dir=place.run_dir,
        num_iterations=place.cell.iterations or 1,
    )


class Progress:
    """A table of cells by seeds: how far each is. Without a terminal, a line for each cell that finishes."""

    def __init__(self, cells: Sequence[Cell], seeds: Sequence[int], console: Console) -> None:
        self._cells, self._seeds, self._console = cells, seeds, console
        self._done: dict[str, str] = {}
        self._lock = threading.Lock()
        self._live = Live(console=console, refresh_per_second=2, get_renderable=self._table)

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def show(self, stage: Stage, done: int) -> None:
        finished = done >= stage.num_iterations and stage.product.exists()
        with self._lock:
            before = self._done.get(stage.name)
            self._done[stage.name] = "done" if finished else f"{100 * done // stage.num_iterations} %"
        if finished and before != "done" and not self._console.is_terminal:
            count = sum(state == "done" for state in self._done.values())
            self._console.print(f"{stage.name} done ({count} of {len(self._cells) * len(self._seeds)})")

    def _table(self) -> Table:
        shown = Table(box=None)
        shown.add_column("cell")
        for seed in self._seeds:
            shown.add_column(f"seed {seed}", justify="right")
        with self._lock:
            for cell in self._cells:
                shown.add_row(cell.label, *(self._done.get(f"{cell.name} seed {seed}", "-") for seed in self._seeds))
        return shown


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
