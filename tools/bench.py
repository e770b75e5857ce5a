"""Measurements that docs/performance.md quotes; each prints its table in Markdown.

python tools/bench.py convert [--size-gib 2] [--rounds 7] [--directory DIR]
python tools/bench.py ppo [--rounds 9] [--threads 2] [--ragged] [--json FILE]
python tools/bench.py train [--rounds 7] [--threads 2] [--parts engine one-pass sft reward dpo logprobs]
                            [--shapes small middle wide] [--json FILE]
python tools/bench.py growth [--rounds 5] [--only AXIS ...] [--json FILE]
python tools/bench.py checkpoint [--rounds 3] [--against DIR] [--directory DIR]
python tools/bench.py gpu [--resume] [--shapes 160m,1.3b,3b] [--json FILE] [--markdown FILE] [--device cpu]
python tools/bench.py rollout [--rounds 5] [--threads 2] [--shapes small middle large] [--rows 1 16 64] [--compile]
                              [--json FILE]
python tools/bench.py start [--rounds 5] [--against DIR] [--only COMMAND ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

TRAIN_PARTS = ("engine", "one-pass", "sft", "reward", "dpo", "logprobs")
GROWTH_AXES = ("rows", "length", "layers", "hidden", "vocabulary", "recompute", "layout")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    benches = parser.add_subparsers(dest="bench", required=True, metavar="BENCH")
    text = "time and peak memory of tools/convert_hf.py against cp on a synthetic checkpoint"
    convert = benches.add_parser("convert", help=text, description=text)
    convert.add_argument("--size-gib", type=float, default=2.0)
    convert.add_argument("--rounds", type=int, default=7, help="interleaved runs of each (default 7)")
    convert.add_argument("--directory", type=Path, help="on the disk to measure (default: the temporary directory)")
    text = "time of a checkpoint and bytes through each rank, on 1 to 8 processes and modelled for 1,024 GPUs"
    checkpoint = benches.add_parser("checkpoint", help=text, description=text)
    checkpoint.add_argument("--rounds", type=int, default=3, help="interleaved saves of each (default 3)")
    checkpoint.add_argument("--against", type=Path, metavar="DIR", help="another checkout, in turns with this one")
    checkpoint.add_argument("--directory", type=Path, help="on the disk to measure (default: the temporary directory)")
    text = "time of a PPO step against TRL 1.12.0's on a small random Llama, on the CPU"
    ppo = benches.add_parser("ppo", help=text, description=text)
    ppo.add_argument("--rounds", type=int, default=9, help="interleaved steps of each (default 9)")
    ppo.add_argument("--threads", type=int, default=2, help="of each side (default 2)")
    ppo.add_argument("--ragged", action="store_true", help="responses end by themselves, not all at the limit")
    ppo.add_argument("--json", type=Path, metavar="FILE", help="write the figures of every iteration")
    text = "time and memory of updates against transformers' and TRL's, on small random Llamas, on the CPU"
    train = benches.add_parser("train", help=text, description=text)
    train.add_argument("--rounds", type=int, default=7, help="interleaved steps of each (default 7)")
    train.add_argument("--threads", type=int, default=2, help="of each side (default 2)")
    train.add_argument("--parts", nargs="+", choices=TRAIN_PARTS, default=list(TRAIN_PARTS), help="default: all")
    train.add_argument(
        "--shapes", nargs="+", choices=("small", "middle", "wide", "tiny"), default=["small", "middle", "wide"]
    )
    train.add_argument("--json", type=Path, metavar="FILE", help="write the figures of every round")
    text = "time a token and memory a rank of an update, as sizes, recomputation and layout grow, on the CPU"
    growth = benches.add_parser("growth", help=text, description=text)
    growth.add_argument("--rounds", type=int, default=5, help="updates of each, interleaved (default 5)")
    growth.add_argument("--only", nargs="+", choices=GROWTH_AXES, default=list(GROWTH_AXES), help="default: all")
    growth.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    text = "training, scoring, decoding and PPO-GIL on one GPU, as shares of what the GPU can do"
    gpu = benches.add_parser("gpu", help=text, description=text)
    gpu.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a trial of the script")
    gpu.add_argument(
        "--shapes", metavar="NAMES", help="of 160m, 1.3b, 3b and tiny (default: the three; on the CPU, tiny)"
    )
    gpu.add_argument("--json", type=Path, default=Path("runs/gpu/results.json"), metavar="FILE")
    gpu.add_argument("--markdown", type=Path, default=Path("runs/gpu/results.md"), metavar="FILE")
    gpu.add_argument("--resume", action="store_true", help="measure only what the JSON file does not hold yet")
    text = "time of sampling against transformers' generate, on the same random weights"
    rollout = benches.add_parser("rollout", help=text, description=text)
    rollout.add_argument("--rounds", type=int, default=5, help="interleaved rollouts of each (default 5)")
    rollout.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    rollout.add_argument(
        "--shapes", nargs="+", choices=("small", "middle", "large"), default=["small", "middle", "large"]
    )
    rollout.add_argument("--rows", nargs="+", type=int, default=[1, 16, 64], help="answered at once (default 1 16 64)")
    rollout.add_argument("--compile", action="store_true", help="also try torch.compile on the step")
    rollout.add_argument("--json", type=Path, help="write the figures of every round")
    text = "time from the start of a process to the first word of each command"
    start = benches.add_parser("start", help=text, description=text)
    start.add_argument("--rounds", type=int, default=5, help="interleaved starts of each (default 5)")
    start.add_argument("--against", type=Path, metavar="DIR", help="another checkout, in turns with this one")
    start.add_argument("--only", nargs="+", metavar="COMMAND", help="rows of the table (default: all)")
    start.add_argument("--json", type=Path, metavar="FILE", help="write the figures of every start")
    given = parser.parse_args(arguments)
    if given.bench == "convert":
        from bench_convert import bench_convert

        print(bench_convert(size=int(given.size_gib * 2**30), rounds=given.rounds, directory=given.directory))
    elif given.bench == "checkpoint":
        from bench_checkpoint import bench_checkpoint

        print(bench_checkpoint(rounds=given.rounds, against=given.against, directory=given.directory))
    elif given.bench == "rollout":
        # Before torch: threads that spin would measure whatever else runs on the machine.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        from bench_rollout import bench_rollout

        table = bench_rollout(
            rounds=given.rounds,
            num_threads=given.threads,
            shapes=given.shapes,
            rows=given.rows,
            compiled=given.compile,
            json_file=given.json,
        )
        print(table)
    elif given.bench == "start":
        from bench_start import bench_start

        print(bench_start(rounds=given.rounds, against=given.against, only=given.only, json_file=given.json))
    elif given.bench == "train":
        _train(given)
    elif given.bench == "growth":
        from bench_growth import bench_growth

        print(bench_growth(rounds=given.rounds, axes=given.only, json_file=given.json))
    elif given.bench == "ppo":
        from bench_ppo import Sizes, bench_ppo

        sizes = Sizes(ragged=given.ragged)
        print(bench_ppo(rounds=given.rounds, num_threads=given.threads, sizes=sizes, json_file=given.json))
    else:
        return _gpu(given)
    return 0


def _train(given: argparse.Namespace) -> None:
    from bench_logprobs import bench_logprobs
    from bench_train import bench_train

    counts = {"rounds": given.rounds, "num_threads": given.threads}
    if parts := [part for part in given.parts if part != "logprobs"]:
        print(bench_train(**counts, parts=parts, shapes=given.shapes, json_file=given.json))
    if "logprobs" in given.parts:
        print(bench_logprobs(**counts))


def _gpu(given: argparse.Namespace) -> int:
    from bench_gpu import bench_gpu, parse_shapes

    from megatron_gil.config import ConfigError

    try:
        return bench_gpu(
            device=given.device,
            shapes=parse_shapes(given.shapes, given.device),
            json_file=given.json,
            markdown_file=given.markdown,
            resume=given.resume,
        )
    except ConfigError as error:
        print(f"bench gpu: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
