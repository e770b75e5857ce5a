"""Measurements that docs/performance.md quotes; each prints its table in Markdown.

python tools/bench.py convert [--size-gib 2] [--rounds 7] [--directory DIR]
python tools/bench.py ppo [--rounds 9] [--threads 2]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    benches = parser.add_subparsers(dest="bench", required=True, metavar="BENCH")
    text = "time and peak memory of tools/convert_hf.py against cp on a synthetic checkpoint"
    convert = benches.add_parser("convert", help=text, description=text)
    convert.add_argument("--size-gib", type=float, default=2.0)
    convert.add_argument("--rounds", type=int, default=7, help="interleaved runs of each (default 7)")
    convert.add_argument("--directory", type=Path, help="on the disk to measure (default: the temporary directory)")
    text = "time of a PPO step against TRL 1.12.0's on a small random Llama, on the CPU"
    ppo = benches.add_parser("ppo", help=text, description=text)
    ppo.add_argument("--rounds", type=int, default=9, help="interleaved steps of each (default 9)")
    ppo.add_argument("--threads", type=int, default=2, help="of each side (default 2)")
    given = parser.parse_args(arguments)
    if given.bench == "convert":
        from bench_convert import bench_convert

        print(bench_convert(size=int(given.size_gib * 2**30), rounds=given.rounds, directory=given.directory))
    else:
        from bench_ppo import bench_ppo

        print(bench_ppo(rounds=given.rounds, num_threads=given.threads))
    return 0


if __name__ == "__main__":
    sys.exit(main())
