"""`bench.py start`: from the start of a process to the first word of its command, on a small input."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.progress import track

from megatron_gil.demo.world import World, WorldSizes, write_world
from megatron_gil.jsonl import iter_jsonl
from megatron_gil.paths import write_whole

ROOT = Path(__file__).resolve().parents[1]
SIZES = WorldSizes(demonstrations=400, preferences=400, prompts=100, eval_prompts=16, heldout_prompts=4)
RECIPES = ROOT / "megatron_gil" / "demo" / "recipes"


@dataclass(frozen=True, slots=True)
class Start:
    """Of one command in one tree."""

    command: str
    tree: Path
    cpu_seconds: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def bench_start(*, rounds: int, against: Path | None, only: Sequence[str] | None, json_file: Path | None) -> str:
    """The table. against: another checkout, whose commands take turns with ours."""
    with tempfile.TemporaryDirectory(prefix="bench-start-") as place:
        root = Path(place)
        commands = _prepare(root)
        chosen = {name: commands[name] for name in commands if not only or name in only}
        trees = [ROOT, *([against.resolve()] if against else [])]
        starts = [Start(name, tree) for name in chosen for tree in trees]
        turns = [start for _ in range(1 + rounds) for start in starts]
        for number, start in enumerate(track(turns, description="starts")):
            outcome = _measure([*chosen[start.command]], start.tree, root, number)
            if number >= len(starts):  # the first round fills the page cache and writes bytecode
                start.cpu_seconds.append(outcome[0])
                start.seconds.append(outcome[1])
    if json_file is not None:
        figures = [
            {"command": s.command, "tree": str(s.tree), "cpu_seconds": s.cpu_seconds, "seconds": s.seconds}
            for s in starts
        ]
        write_whole(json_file, json.dumps(figures, indent=1))
    return _table(starts, trees, rounds)


def _prepare(root: Path) -> Mapping[str, Sequence[str]]:
    """Name -> what follows `megatron-gil`; {new} is a path that nothing has."""
    world = write_world(root / "world", seed=1, sizes=SIZES)
    reward = ["reward", "--config", str(RECIPES / "reward.yaml"), f"models.reward_model={world.model}"]
    reward += [f"data.train={world.preferences}"]
    run = root / "reward"
    made = [sys.executable, "-m", "megatron_gil", *reward, f"run.dir={run}", "train.updates=1"]
    subprocess.run(made, env=_environment(ROOT, root), check=True, capture_output=True)
    model = f"models.reward_model={run / 'checkpoints' / 'iter_0000001' / 'reward_model'}"
    responses = _write_responses(world, root / "responses.jsonl")
    ppo = ["ppo", "--config", str(RECIPES / "ppo_gil.yaml"), f"models.policy={world.model}", model]
    ppo += [f"data.train={world.prompts}", "run.dir={new}"]
    prompts = [f"data.train={world.prompts_eval}", "data.max_prompt_tokens=40", "sampling.max_new_tokens=24"]
    return {
        "--help": ["--help"],
        "report": ["report", str(run), "--output", "{new}.html"],
        "plan": ["plan"],
        "evaluate": ["evaluate", str(responses), str(responses)],
        "prepare-data": ["prepare-data", "jsonl", "--input", str(world.demonstrations), "--output", "{new}"],
        "convert import": ["convert", "import", str(world.model), "{new}"],
        "convert verify": ["convert", "verify", str(world.model), str(world.model)],
        "demo": ["demo", "--output", str(root / "world")],  # which it refuses, once it is ready to begin
        "ppo --dry-run": [*ppo, "--dry-run"],
        "ppo": ppo,
        "reward": [*reward, "run.dir={new}"],
        "generate": ["generate", f"models.policy={world.model}", *prompts, "output={new}.jsonl"],
        "score": [
            "score",
            model,
            f"data.train={responses}",
            "data.max_prompt_tokens=40",
            "data.max_tokens=72",
            "output={new}.jsonl",
        ],
    }


def _write_responses(world: World, path: Path) -> Path:
    rows = [row for _, row in iter_jsonl(world.demonstrations)][:16]
    lines = [json.dumps({"prompt": row["prompt"], "response": row["completion"], "score": 1.0}) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _environment(tree: Path, root: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "TMPDIR": str(root), "COLUMNS": "80"}


def _measure(arguments: Sequence[str], tree: Path, root: Path, number: int) -> tuple[float, float]:
    """(seconds on a CPU, seconds) until there is output; then the process is killed."""
    given = [text.replace("{new}", str(root / f"new_{number}")) for text in arguments]
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_gil", *given],
        cwd=root,  # python -m looks into the working directory before PYTHONPATH
        env=_environment(tree, root),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    word = ""
    while not word.strip() and (read := os.read(process.stdout.fileno(), 4096)):
        word += read.decode(errors="replace")
    seconds = time.perf_counter() - began
    process.kill()
    _, _, used = os.wait4(process.pid, 0)
    process.returncode = 0  # it has been waited for
    process.stdout.close()
    refused = word.strip().startswith((f"megatron-gil {given[0]}", "Traceback")) and given[0] != "demo"
    if refused or not word.strip():
        raise RuntimeError(f"megatron-gil {' '.join(given)} did not start: {word}")
    return used.ru_utime + used.ru_stime, seconds


def _table(starts: Sequence[Start], trees: Sequence[Path], rounds: int) -> str:
    heads = ["seconds on a CPU", "seconds"]
    if len(trees) > 1:
        heads = [f"{head}, {which}" for head in heads for which in ("here", str(trees[1]))]
    lines = [
        f"{rounds} interleaved starts of each, median (min to max); one thread, {os.cpu_count()} CPUs, load "
        f"{os.getloadavg()[1]:.1f} in the last 5 minutes.",
        "",
        f"| command | {' | '.join(heads)} |",
        "|---" * (1 + len(heads)) + "|",
    ]
    for command in dict.fromkeys(start.command for start in starts):
        own = [start for start in starts if start.command == command]
        cells = [_spread(values) for kind in ("cpu_seconds", "seconds") for s in own for values in [getattr(s, kind)]]
        lines.append(f"| {command} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
