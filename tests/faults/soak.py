"""Kills a run over and over at random moments, then compares it with one that was left alone, to the last bit.

    python -m tests.faults.soak --kills 100 --seed 1

Each time: kill -9 of rank 0, of rank 1, or of both at once, between the first and the fourth second after the start;
the rank that is left must end by itself with exit code 1 and a line that names the dead one.
"""

from __future__ import annotations

import argparse
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.faults.processes import Ranks
from tests.faults.running import arguments, final_weights, metrics_of
from tests.world import write_world

VICTIMS = ((0,), (1,), (0, 1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--iterations", type=int, default=1200, help="of the run; it must outlast the kills")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        return soak(Path(directory), options)


def soak(directory: Path, options: argparse.Namespace) -> int:
    started, rng = time.monotonic(), random.Random(options.seed)
    (directory / "world").mkdir()
    world = write_world(directory / "world")
    whole, killed = (_arguments(world, directory / name, options.iterations) for name in ("whole", "killed"))
    ranks = Ranks(whole, world, directory / "log")
    assert ranks.wait(3600) == [0, 0], ranks.said(0)
    seconds, progress, phases = time.monotonic() - started, 0, Counter[str]()
    for kill in range(1, options.kills + 1):
        ranks = Ranks(killed, world, directory / f"log_{kill}")
        time.sleep(rng.uniform(1.0, 4.0))
        victims = rng.choice(VICTIMS)
        before = time.monotonic()
        ranks.kill(victims)
        codes = ranks.wait()
        progress = len(metrics_of(directory / "killed")) if (directory / "killed" / "metrics.jsonl").exists() else 0
        if codes == [0, 0]:
            raise SystemExit(f"the run ended after {kill - 1} kills; give more --iterations")
        for rank in {0, 1} - set(victims):
            assert codes[rank] == 1, (codes, ranks.said(rank))
            line = ranks.said(rank).strip().splitlines()[-1]
            assert f"rank {victims[0]} " in line or "of 2 ranks" in line or "no store" in line, line
            phases[line.partition(" s into ")[2].partition(":")[0] or "start-up"] += 1
        waited = time.monotonic() - before
        print(f"kill {kill}: ranks {victims} at iteration {progress}, the rest ended after {waited:.1f} s", flush=True)
    ranks = Ranks(killed, world, directory / "log_last")
    assert ranks.wait(3600) == [0, 0], ranks.said(0)
    same_metrics = metrics_of(directory / "killed") == metrics_of(directory / "whole")
    same_weights = final_weights(directory / "killed") == final_weights(directory / "whole")
    print(
        f"{options.kills} kills in {time.monotonic() - started:.0f} s (uninterrupted {seconds:.0f} s); "
        f"{options.iterations} iterations; metrics equal: {same_metrics}; weights and moments equal: {same_weights}; "
        f"survivors were in {dict(phases.most_common())}"
    )
    return 0 if same_metrics and same_weights else 1


def _arguments(world: Path, run: Path, iterations: int) -> list[str]:
    more = (
        f"ppo.iterations={iterations}",
        "checkpoint.every=1",
        "log.eval_every=50",
        "parallel.timeout_s=24",
        "run.max_skipped_updates=100000",
    )
    return arguments("ppo", world, run, *more)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    raise SystemExit(main())
