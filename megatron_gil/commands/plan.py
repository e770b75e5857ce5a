"""`megatron-gil plan`: layouts of a model on so many GPUs, the memory of each part, the time, and what to change."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_gil.config import PpoConfig
from megatron_gil.config.files import load_config
from megatron_gil.models.families import ModelSpec
from megatron_gil.planning.hardware import GPUS, Assumptions, Gpu
from megatron_gil.planning.memory import GIB, MIB, OVERHEAD_BYTES, Cut, SizedModel, num_parameters
from megatron_gil.planning.presets import ppo_config, read_model, recipe
from megatron_gil.planning.rank import RankMemory
from megatron_gil.planning.search import Plan, advice, find_plans, limits, offload_lines
from megatron_gil.planning.workload import Workload, read_workload

DAY = 86400.0


def plan(arguments: argparse.Namespace) -> int:
    """Print the plan. Exit code 0 also where nothing fits: the question was answered."""
    console, spec = wide_console(), read_model(arguments.model)
    gpu, assume = GPUS[arguments.gpu], Assumptions()
    config = ppo_config(arguments.overrides)
    if arguments.config is not None:
        config = load_config(PpoConfig, arguments.config, ["run.dir=plan", *arguments.overrides])
    workload = read_workload(config, lambda role: spec)
    memory = int(arguments.gpu_memory * GIB)
    plans = find_plans(workload, arguments.gpus, memory, gpu, assume)
    count = num_parameters(SizedModel(role="", spec=spec, head="lm", trained=False), Cut(), 0)
    console.print(
        f"{arguments.model}: {count / 1e9:.2f} billion parameters, PPO with {len(workload.models)} models on "
        f"{arguments.gpus} x {gpu.name}, {arguments.gpu_memory:g} GiB each. All figures are estimates."
    )
    console.print(_layout_table(plans, workload))
    best = plans[0]
    if best.workload.global_size != workload.global_size:
        console.print(_batch_line(best, workload), markup=False)
    console.print(_memory_table(best))
    if config.reward.function is not None:
        console.print(f"- the time of reward.function={config.reward.function} itself is not in it", markup=False)
    for line in (*offload_lines(plans), *advice(plans, memory)):
        console.print(f"- {line}", markup=False)
    if best.fits:
        if arguments.config is None and not arguments.overrides:
            console.print(_recipe_table(spec, arguments.gpus, memory, gpu, assume))
        console.print("What limits the best plan, the worst first:")
        for line in limits(best, assume):
            console.print(f"- {line}", markup=False)
    console.print(_assumptions(assume), markup=False)
    return 0


def _layout_table(plans: Sequence[Plan], workload: Workload) -> Table:
    assert workload.rollout is not None
    table = _table("layouts (tp x pp x dp), best first")
    for name in ("layout", "rows", "recomp.", "GiB", "worst phase", "rollout", "score", "update", "days"):
        table.add_column(
            name, justify="left" if name in ("recomp.", "worst phase") else "right", no_wrap=name == "layout"
        )
    for each in plans:
        time, worst = each.time, each.worst
        days = time.total * workload.rollout.num_iterations / DAY
        times = [f"{time.rollout:.1f}", f"{time.score:.1f}", f"{time.update:.1f}", f"{days:.1f}"]
        table.add_row(
            str(each.cut),
            f"{each.workload.micro_size}/{size}"
            if (size := each.workload.global_size) != workload.global_size
            else str(each.workload.micro_size),
            each.workload.precision.recompute,
            f"{worst.peak / GIB:.1f}",
            worst.worst_phase,
            *(times if each.fits else ["too big", "", "", ""]),
        )
    table.caption = "rows: of a microbatch (/of an update, where that cannot be as asked);\n"
    table.caption += "GiB: the fullest GPU at its fullest; recomp.: of activations (models.recompute);\n"
    table.caption += "rollout, score, update: seconds an iteration"
    return table


def _batch_line(best: Plan, workload: Workload) -> str:
    rollout, rows = best.workload.rollout, best.workload.global_size
    assert rollout is not None
    return (
        f"{best.cut} cannot share a batch of {workload.global_size} rows evenly; it is planned with batch.global_size="
        f"{rows} and ppo.prompts x ppo.responses_per_prompt={rollout.num_rows}."
    )


def _memory_table(best: Plan) -> Table:
    """Every part of the fullest rank of the best plan, by model and phase."""
    return memory_table(best.worst, f"one GPU of {best.cut}, pipeline rank {best.worst_pp_rank}")


def wide_console() -> Console:
    """As wide as the terminal; where the output is a file or a pipe, wide enough for the tables."""
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 118)


def _table(title: str) -> Table:
    """A table of at most 80 columns."""
    shown = {"title_justify": "left", "caption_justify": "left", "box": box.SIMPLE_HEAD}
    return Table(title=title, pad_edge=False, collapse_padding=True, **shown)  # type: ignore[arg-type]


def memory_table(rank: RankMemory, title: str) -> Table:
    parts = ("weights", "gradients", "optimizer", "activations", "KV cache", "logits")
    short = {"gradients": "grads", "optimizer": "optim", "activations": "activ"}
    unit, name = (GIB, "GiB") if rank.held >= GIB else (MIB, "MiB")
    table = _table(f"{title}; {name}, estimated")
    if any(waiting.total for waiting in rank.waiting.values()):
        table.caption = "below 0: what waits on the host meanwhile, or has no memory (models.offload)"
    table.add_column("", no_wrap=True)
    for name in (*(short.get(part, part) for part in parts), "total"):
        table.add_column(name, justify="right")

    def add(name: str, found: dict[str, int], total: int) -> None:
        table.add_row(name, *(f"{found[p] / unit:.2f}" if found.get(p) else "" for p in parts), f"{total / unit:.2f}")

    for role, held in rank.resident.items():
        found = {"weights": held.weights, "gradients": held.gradients, "optimizer": held.optimizer}
        add(role, found, held.total)
    table.add_section()
    for phase, found in rank.phases.items():
        waiting = rank.waiting[phase]
        change = {part: found.get(part, 0) - getattr(waiting, part, 0) for part in parts}
        add(f"+ {phase}", change, sum(change.values()))
    table.add_section()
    table.add_row("+ overhead", *[""] * len(parts), f"{OVERHEAD_BYTES / unit:.2f}")
    table.add_row(f"peak ({rank.worst_phase})", *[""] * len(parts), f"{rank.peak / unit:.2f}")
    return table


def _recipe_table(spec: ModelSpec, num_gpus: int, memory: int, gpu: Gpu, assume: Assumptions) -> Table:
    """Days of every training run of the reproduction, each in its own best layout."""
    table = _table("the reproduction's recipe")
    for name in ("run", "tp x pp x dp", "offload", "iterations", "s each", "days"):
        table.add_column(name, justify="left" if name in ("run", "offload") else "right")
    total = 0.0
    for name, stage in recipe().items():
        workload = read_workload(stage.config, lambda role: spec)
        best = find_plans(workload, num_gpus, memory, gpu, assume)[0]
        days = stage.num_iterations * best.time.total / DAY
        total += days
        offload = best.workload.offload
        table.add_row(
            name, str(best.cut), offload, f"{stage.num_iterations:,}", f"{best.time.total:.1f}", f"{days:.2f}"
        )
    table.add_section()
    table.add_row("all, one after the other", "", "", "", "", f"{total:.1f}")
    return table


def _assumptions(assume: Assumptions) -> str:
    return (
        f"Assumed: {assume.training_mfu:.0%} of peak in training, {assume.memory_share:.0%} of memory bandwidth in "
        f"decoding, at least {assume.layer_launch_s * 1e3:g} ms a layer and token (CUDA graphs), "
        f"{assume.network_bandwidth / 1e9:.0f} GB/s a GPU between nodes of {assume.gpus_per_node}; every row as long "
        "as the limits allow; nothing overlaps. docs/planning.md compares this with published runs."
    )
