"""The whole pipeline in miniature, through the same commands and files as a 7B run, two stages at a time.

    world -> sft -> reward, dpo -> ppo, ppo_kl, ppo_gil, ppo_gil_targets -> responses -> scores -> report

A stage that has finished is not run again, so a demo that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from megatron_gil.config import COMMAND_CONFIGS, ConfigError
from megatron_gil.config.files import load_config
from megatron_gil.console import Interrupted
from megatron_gil.demo.results import POLICIES, read_results, write_results
from megatron_gil.demo.stages import Runner, Stage, StageFailed
from megatron_gil.demo.world import World, WorldSizes, world_at, write_world
from megatron_gil.paths import write_whole
from megatron_gil.training.run.lock import FileLock

WORKER = ("-m", "megatron_gil.demo.worker")
RECIPES = Path(__file__).with_name("recipes")
WORKERS = 2
QUICK_UPDATES = {"sft": 80, "reward": 40, "dpo": 20, "ppo": 15, "ppo_kl": 15, "ppo_gil": 15, "ppo_gil_targets": 15}
QUICK_SIZES = WorldSizes(demonstrations=2000, preferences=2000, prompts=500, eval_prompts=64, heldout_prompts=16)
HELD_OUT_PROMPTS = "held_out_prompts.jsonl"  # of the training domains and of the held-out one
STOPPED = 75
LOCK_FILE = "demo.lock"


def run_demo(output: Path, *, quick: bool, seed: int) -> int:
    """Run every stage into `output`, print the table, write report.html; the exit code."""
    started = time.monotonic()
    console = Console(stderr=True, highlight=False)
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock.take(output / LOCK_FILE, f"--output {output}")
    assert lock is not None, "nothing asks it to stop"
    try:
        with _progress(console) as bars:
            _run_stages(output, _Bars(bars), quick=quick, seed=seed)
        page = write_results(read_results(output), output, Console())
    except Interrupted as stopped:
        console.print(f"stopped; `megatron-gil demo --output {output}` goes on from here", markup=False, soft_wrap=True)
        return 130 if stopped.number == signal.SIGINT else STOPPED
    except StageFailed as error:
        print(f"megatron-gil demo: {error}", file=sys.stderr)
        return 1
    finally:
        lock.release()
    console.print(f"{time.monotonic() - started:.0f} s in all. Open {page} in a browser.", markup=False)
    return 0


def _run_stages(output: Path, shown: _Bars, *, quick: bool, seed: int) -> None:
    world = _take_world(output, quick=quick, seed=seed)
    for name in ("responses", "scores"):
        (output / name).mkdir(exist_ok=True)
    stages = _plan(output, world, quick=quick, seed=seed)
    shown.announce(stages)
    Runner(output / "logs", worker=WORKER, workers=WORKERS, show=shown.show).run_all(stages)


def _take_world(output: Path, *, quick: bool, seed: int) -> World:
    """The world of this output directory; a new one where there is none, the same one where it was begun before."""
    record, wanted, beside = output / "demo.json", {"quick": quick, "seed": seed}, output / ".world.tmp"
    if record.exists():
        found = json.loads(record.read_text(encoding="utf-8"))
        if found != wanted:
            raise ConfigError(f"{output} was begun with {found}, not {wanted}; choose another --output")
    else:
        if any(path != beside and not path.name.startswith(LOCK_FILE) for path in output.iterdir()):
            raise ConfigError(f"{output} is not empty and holds no demo; choose another --output")
        shutil.rmtree(beside, ignore_errors=True)  # of a start that was stopped here
        write_world(beside, seed=seed, sizes=QUICK_SIZES if quick else None)
        write_whole(record, json.dumps(wanted))
    if beside.exists():
        beside.rename(output / "world")
    world, held_out = world_at(output / "world"), output / HELD_OUT_PROMPTS
    if not held_out.exists():
        write_whole(held_out, world.prompts_eval.read_text("utf-8") + world.prompts_heldout.read_text("utf-8"))
    return world


def _plan(output: Path, world: World, *, quick: bool, seed: int) -> list[Stage]:
    """Stages in the order in which they begin, of two that could the longer one first."""

    def train(recipe: str, command: str, role: str, needs: Sequence[Stage], *settings: str) -> Stage:
        run_dir, count = output / recipe, _num_iterations(recipe, command, quick)
        key = "ppo.iterations" if command == "ppo" else "train.updates"
        fixed = [f"run.dir={run_dir}", f"run.seed={seed}", f"{key}={count}"]
        return Stage(
            name=recipe,
            arguments=[command, "--config", str(RECIPES / f"{recipe}.yaml"), *fixed, *settings],
            product=run_dir / "checkpoints" / f"iter_{count:07}" / role,
            needs=[stage.name for stage in needs],
            run_dir=run_dir,
            num_iterations=count,
        )

    sft = train("sft", "sft", "policy", [], f"models.policy={world.model}", f"data.train={world.demonstrations}")
    reward = train(
        "reward",
        "reward",
        "reward_model",
        [sft],
        f"models.reward_model={sft.product}",
        f"data.train={world.preferences}",
        f"data.eval={world.preferences_eval}",
    )
    dpo = train("dpo", "dpo", "policy", [sft], f"models.policy={sft.product}", f"data.train={world.preferences}")
    rl = [f"models.policy={sft.product}", f"models.reward_model={reward.product}", f"data.train={world.prompts}"]
    ppo = [train(name, "ppo", "policy", [sft, reward], *rl) for name in ("ppo_gil", "ppo_gil_targets", "ppo", "ppo_kl")]
    policies = {stage.name: stage for stage in (sft, dpo, *ppo)}
    assert set(policies) == set(POLICIES)
    answers = [_answer(output, policies[name], seed) for name in POLICIES]
    scores = [_score(output, policies[name], reward) for name in POLICIES]
    return [sft, reward, dpo, *ppo, *answers, *scores]


def _answer(output: Path, policy: Stage, seed: int) -> Stage:
    product = output / "responses" / f"{policy.name}.jsonl"
    settings = ["data.max_prompt_tokens=40", "sampling.max_new_tokens=24", f"run.seed={seed}"]
    files = [f"models.policy={policy.product}", f"data.train={output / HELD_OUT_PROMPTS}"]
    arguments = ["generate", *files, *settings, f"output={product}"]
    return Stage(name=f"answers of {policy.name}", arguments=arguments, product=product, needs=[policy.name])


def _score(output: Path, policy: Stage, reward: Stage) -> Stage:
    responses, product = (output / folder / f"{policy.name}.jsonl" for folder in ("responses", "scores"))
    settings = ["data.max_prompt_tokens=40", "data.max_tokens=72", "batch.micro_size=64"]
    files = [f"models.reward_model={reward.product}", f"data.train={responses}"]
    arguments = ["score", *files, *settings, f"output={product}"]
    needs = [reward.name, f"answers of {policy.name}"]
    return Stage(name=f"scores of {policy.name}", arguments=arguments, product=product, needs=needs)


def _num_iterations(recipe: str, command: str, quick: bool) -> int:
    if quick:
        return QUICK_UPDATES[recipe]
    config: Any = load_config(COMMAND_CONFIGS[command], RECIPES / f"{recipe}.yaml", [f"run.dir={recipe}"])
    return config.ppo.iterations if command == "ppo" else config.train.updates


class _Bars:
    """A bar per stage."""

    def __init__(self, bars: Progress) -> None:
        self._bars, self._tasks = bars, dict[str, TaskID]()

    def announce(self, stages: Sequence[Stage]) -> None:
        for stage in stages:
            self._tasks[stage.name] = self._bars.add_task(stage.name, total=stage.num_iterations, start=False)

    def show(self, stage: Stage, done: int) -> None:
        if done == 0:
            self._bars.start_task(self._tasks[stage.name])
        self._bars.update(self._tasks[stage.name], completed=done)


def _progress(console: Console) -> Progress:
    left = TextColumn("left"), TimeRemainingColumn()
    return Progress(
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        *left,
        console=console,
    )
