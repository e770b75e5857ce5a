"""Whether two runs are the same: settings, metrics of every iteration, tensors of the newest checkpoint both have.

    python tools/compare_runs.py RUN_A RUN_B                     to the last bit
    python tools/compare_runs.py RUN_A RUN_B --tolerance 1e-5    of the largest value of each metric or tensor

What takes time (time/...) is left out, and what settings differ is said but decides nothing: a run at another layout
should be the same run. Exit codes: 0 the same, 1 not the same, 2 the input is wrong.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_gil.config import ConfigError
from megatron_gil.evaluation.report.runs import Run, config_differences, read_runs
from megatron_gil.models.slices import SlicedTensors

SHOWN = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far apart two values of one name are, as a share of the largest of both."""

    name: str
    where: str
    largest: float


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs=2, metavar="RUN")
    parser.add_argument("--tolerance", type=float, default=0.0, metavar="X", help="largest relative difference allowed")
    arguments = parser.parse_args(argv)
    console = Console(highlight=False)
    try:
        ours, theirs = read_runs(arguments.runs)
        missing = sorted(_iterations(ours) ^ _iterations(theirs))
        found = [*_metrics(ours, theirs), *_tensors(arguments.runs, console)]
    except ConfigError as error:
        print(f"compare_runs: {error}", file=sys.stderr)
        return 2
    for key, values in config_differences([ours, theirs]):
        console.print(f"setting {key}: {' | '.join(values)}", markup=False)
    if missing:
        console.print(f"iterations that only one of them has: {', '.join(map(str, missing[:SHOWN]))}")
    apart = sorted((d for d in found if not d.largest <= arguments.tolerance), key=lambda d: -d.largest)
    if apart:
        console.print(_table(apart))
    same = not apart and not missing
    console.print(
        f"{len(found)} metrics and tensors compared, {len(apart)} differ by more than {arguments.tolerance:g}"
    )
    return 0 if same else 1


def _iterations(run: Run) -> set[int]:
    return {row["iteration"] for row in run.metrics}


def _metrics(ours: Run, theirs: Run) -> Iterator[Difference]:
    other = {row["iteration"]: row for row in theirs.metrics}
    rows = [(row["iteration"], row, other[row["iteration"]]) for row in ours.metrics if row["iteration"] in other]
    for name in dict.fromkeys(
        key for _, a, b in rows for key in (*a, *b) if key != "iteration" and not key.startswith("time/")
    ):
        pairs = [(i, a.get(name), b.get(name)) for i, a, b in rows]
        scale = max((abs(v) for _, a, b in pairs for v in (a, b) if v is not None and v == v), default=0.0)
        apart = [(_distance(a, b, scale), i) for i, a, b in pairs]
        first = next((i for distance, i in apart if distance > 0), None)
        where = "" if first is None else f"from iteration {first}"
        yield Difference(name=name, where=where, largest=max((distance for distance, _ in apart), default=0.0))


def _distance(a: float | None, b: float | None, scale: float) -> float:
    """Infinite where one of them is not a number."""
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    if a == b:
        return 0.0
    return math.inf if math.isnan(a) or math.isnan(b) else abs(a - b) / scale


def _tensors(directories: Sequence[Path], console: Console) -> Iterator[Difference]:
    """Of the newest iteration of which both have a checkpoint: models and optimizers."""
    kept = [{path.name for path in (run / "checkpoints").glob("iter_*")} for run in directories]
    if not (shared := sorted(kept[0] & kept[1])):
        console.print("no checkpoint of the same iteration in both: metrics alone are compared")
        return
    ours, theirs = (_open(run / "checkpoints" / shared[-1]) for run in directories)
    for name in dict.fromkeys([*ours, *theirs]):
        where = shared[-1]
        a, b = (_read(*tensors[name]) if name in tensors else None for tensors in (ours, theirs))
        if a is None or b is None or a.shape != b.shape:
            yield Difference(name=name, where=f"{where}: not in both, or of another shape", largest=math.inf)
            continue
        scale, apart = float(max(a.abs().max(), b.abs().max())), float((a - b).abs().max())
        yield Difference(name=name, where=where, largest=math.inf if math.isnan(apart) else apart / (scale or 1.0))


def _open(checkpoint: Path) -> dict[str, tuple[SlicedTensors, str]]:
    """Directory and tensor name -> where to read it."""
    found: dict[str, tuple[SlicedTensors, str]] = {}
    for directory in sorted({path.parent for path in checkpoint.rglob("*.safetensors")}):
        stem = "optimizer" if directory.name.endswith(".optimizer") else "model"
        tensors = SlicedTensors.open(directory, stem)
        found |= {f"{directory.name}/{name}": (tensors, name) for name in tensors.slices}
    return found


def _read(tensors: SlicedTensors, name: str) -> Tensor:
    return tensors.read(name, tuple(slice(0, size) for size in tensors.shape(name))).double()


def _table(apart: Sequence[Difference]) -> Table:
    shown = Table(title="What differs most", title_justify="left", box=None)
    for name, justify in (("name", "left"), ("where", "left"), ("relative difference", "right")):
        shown.add_column(name, justify=justify)  # type: ignore[arg-type]
    for difference in apart[:SHOWN]:
        shown.add_row(difference.name, difference.where, f"{difference.largest:.3g}")
    return shown


if __name__ == "__main__":
    sys.exit(main())
