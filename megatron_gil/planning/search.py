"""All sensible layouts of a workload on so many GPUs, the fastest that fits first, and what to change if none fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_gil.config import ConfigError
from megatron_gil.models.families import check_layout
from megatron_gil.planning.hardware import Assumptions, Gpu
from megatron_gil.planning.memory import GIB, HOST_BANDWIDTH, Cut
from megatron_gil.planning.rank import RankMemory, rank_memory
from megatron_gil.planning.timing import IterationTime, checkpoint_bytes, iteration_time
from megatron_gil.planning.workload import Workload

MICRO_SIZES = (8, 4, 2, 1)
OFFLOADS = ("none", "frozen", "rollout", "all")
MOST_PIPELINE_RANKS = 16
MOST_GROWTH = 1.125
"""Where the replicas of a layout cannot share the batch evenly, the batch may grow up to this factor so that they
can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One layout with the largest microbatch that fits; activations are recomputed only where they must be, and models
    wait on the host only where it does not fit without."""

    cut: Cut
    workload: Workload
    ranks: Sequence[RankMemory]
    """One for each pipeline rank."""
    time: IterationTime
    fits: bool

    @property
    def worst_pp_rank(self) -> int:
        return max(range(len(self.ranks)), key=lambda i: self.ranks[i].peak)

    @property
    def worst(self) -> RankMemory:
        return self.ranks[self.worst_pp_rank]


def find_plans(workload: Workload, num_gpus: int, memory_bytes: int, gpu: Gpu, assume: Assumptions) -> list[Plan]:
    """The plans that fit, sorted by time per row; then those that do not, sorted by memory.

    A layout whose replicas cannot share the batch evenly is planned with the next larger batch that they can share.
    Such a layout is left out where that batch is much larger (MOST_GROWTH), unless all layouts are like that.
    """
    cuts, wanted = list(_cuts(workload, num_gpus, assume)), workload.global_size
    sized = [(cut, workload.shared_by(cut.dp_size)) for cut in cuts]
    near = [(cut, shared) for cut, shared in sized if shared.global_size <= MOST_GROWTH * wanted]
    plans = [_plan(shared, cut, memory_bytes, gpu, assume) for cut, shared in near or sized]

    def order(plan: Plan) -> tuple[bool, float]:
        return not plan.fits, plan.time.total / plan.workload.global_size if plan.fits else plan.worst.peak

    return sorted(plans, key=order)


def advice(plans: Sequence[Plan], memory_bytes: int) -> list[str]:
    """What to change where nothing fits, the cheapest change first."""
    best = plans[0]
    if best.fits:
        return []
    over = best.worst.peak - memory_bytes
    lines = [
        f"nothing fits, models.offload={best.workload.offload} included: {best.cut} comes nearest and lacks "
        f"{over / GIB:.1f} GiB (pipeline rank {best.worst_pp_rank}, phase {best.worst.worst_phase})"
    ]
    phases, held = best.worst.phases, best.worst.held_in(best.worst.worst_phase)
    if "rollout" in phases and best.worst.worst_phase == "rollout":
        lines.append("lower sampling.micro_size: the key-value cache shrinks with it")
        received = phases["rollout"]["weights"]
        if received:
            lines.append(
                f"or cut by parallel.tensor_size in place of pipeline_size: to sample, a pipeline rank receives the "
                f"other ranks' part of the policy, {received / GIB:.1f} GiB here"
            )
    if held > memory_bytes:
        state = held * best.cut.num_gpus
        enough = 2 ** (-(-state // memory_bytes) - 1).bit_length()
        lines.append(
            f"weights, gradients, optimizer alone take {held / GIB:.1f} GiB a GPU: use more GPUs, at least {enough}, "
            "or larger ones"
        )
    else:
        lines.append("shorten data.max_prompt_tokens and sampling.max_new_tokens (or data.max_tokens)")
        lines.append("or use twice as many GPUs")
    if any(model.role in ("critic", "classifier") and model.trained for model in best.workload.models):
        lines.append("or start critic and reward model from a smaller model, or set ppo.advantages=rloo: no critic")
    return lines


def offload_lines(plans: Sequence[Plan]) -> list[str]:
    """Which layouts need models.offload, and what it costs or would save in the best one. Empty where none fits."""
    best, lines = plans[0], []
    if not best.fits:
        return lines
    needs = [f"{plan.cut} ({plan.workload.offload})" for plan in plans if plan.fits and plan.workload.offload != "none"]
    if needs:
        lines.append(f"these fit only with models.offload: {', '.join(needs)}")
    offload, peaks = best.workload.offload, {name: _peak(best, name) / GIB for name in OFFLOADS}
    if offload == "none":
        saved = ", ".join(f"{name} {peaks['none'] - peak:.1f}" for name, peak in peaks.items() if name != "none")
        lines.append(f"models.offload would take off the fullest GPU of {best.cut}, in GiB: {saved}")
        return lines
    host = max(rank.host for rank in best.ranks) / GIB
    seconds = max(sum(rank.moved.values()) for rank in best.ranks) / HOST_BANDWIDTH
    lines.append(
        f"models.offload={offload}: without it the fullest GPU of {best.cut} needs {peaks['none']:.1f} GiB. It takes "
        f"{host:.1f} GiB of host memory for each GPU, and {seconds:.1f} s an iteration (within score and update) to "
        f"move them at {HOST_BANDWIDTH / 1e9:.0f} GB/s"
    )
    return lines


def _peak(plan: Plan, offload: str) -> int:
    """Of the fullest GPU of the same plan with another models.offload."""
    workload = plan.workload.with_offload(offload)
    return max(rank_memory(workload, plan.cut, pp_rank).peak for pp_rank in range(plan.cut.pp_size))


def limits(plan: Plan, assume: Assumptions) -> list[str]:
    """What keeps this plan from being faster, the largest share of time first. On more GPUs these limits are met
    first."""
    time, workload, cut = plan.time, plan.workload, plan.cut
    found: list[tuple[float, str]] = []
    if workload.rollout:
        share = time.rollout / time.total
        found.append((share, f"decoding takes {share:.0%} of an iteration, and more GPUs do not shorten a token"))
    if time.bubble > 0.2:
        count = workload.num_microbatches(cut)
        found.append(
            (
                time.bubble * (time.update + time.score) / time.total,
                f"pipeline bubble {time.bubble:.0%}: {count} microbatch(es) for {cut.pp_size} pipeline ranks; "
                f"batch.global_size={4 * cut.pp_size * cut.dp_size * workload.micro_size} would bring it under 20%",
            )
        )
    most = workload.global_size
    found.append(
        (
            cut.dp_size / most,
            f"data parallelism ends at {most} replicas, the rows of an update (batch.global_size): this layout has "
            f"{cut.dp_size}, and {most * cut.tp_size * cut.pp_size} GPUs are the most it can use",
        )
    )
    size = checkpoint_bytes(workload)
    seconds = size / assume.storage_bandwidth
    found.append(
        (
            seconds / 100 / time.total,
            f"a checkpoint is {size / 1e9:,.0f} GB: {seconds:,.0f} s at {assume.storage_bandwidth / 1e9:.0f} GB/s, "
            "while GPUs wait where a host lacks the memory to copy it first (checkpoint.background); with "
            f"checkpoint.every=100 {seconds / 100 / time.total:.0%} of the time",
        )
    )
    return [text for _, text in sorted(found, key=lambda pair: -pair[0])]


def _cuts(workload: Workload, num_gpus: int, assume: Assumptions) -> Iterator[Cut]:
    """Every layout of exactly so many GPUs that all models can be cut into; tensor parallelism within a node."""
    for tp_size in _divisors(num_gpus, assume.gpus_per_node):
        if num_gpus > assume.gpus_per_node and assume.gpus_per_node % tp_size:
            continue  # it would cross the border of a node
        for pp_size in _divisors(num_gpus // tp_size, MOST_PIPELINE_RANKS):
            cut = Cut(
                tp_size=tp_size,
                pp_size=pp_size,
                dp_size=num_gpus // (tp_size * pp_size),
                sequence_parallel=tp_size > 1,
                distributed_optimizer=num_gpus > tp_size * pp_size,
            )
            if _is_possible(workload, cut):
                yield cut


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def _is_possible(workload: Workload, cut: Cut) -> bool:
    try:
        for model in workload.models:
            check_layout(model.spec, cut.tp_size, cut.pp_size, cut.sequence_parallel)
    except ConfigError:
        return False
    return True


def _plan(workload: Workload, cut: Cut, memory_bytes: int, gpu: Gpu, assume: Assumptions) -> Plan:
    """The fastest that fits, with as little of models.offload as that takes; else the smallest."""
    candidates: list[Plan] = []
    for offload in OFFLOADS[OFFLOADS.index(workload.offload) :]:
        candidates += _candidates(workload.with_offload(offload), cut, memory_bytes, gpu, assume)
        if any(plan.fits for plan in candidates):
            break
    return min(candidates, key=lambda p: (not p.fits, p.time.total if p.fits else p.worst.peak))


def _candidates(workload: Workload, cut: Cut, memory_bytes: int, gpu: Gpu, assume: Assumptions) -> Iterator[Plan]:
    for recompute in ("none", "full"):
        for micro_size in MICRO_SIZES:
            if workload.global_size % (cut.dp_size * micro_size):
                continue
            tried = workload.with_micro_size(micro_size, recompute)
            ranks = [rank_memory(tried, cut, pp_rank) for pp_rank in range(cut.pp_size)]
            time = iteration_time(tried, cut, gpu, assume)
            moving = {act: max(rank.moved[act] for rank in ranks) / HOST_BANDWIDTH for act in ("score", "update")}
            yield Plan(
                cut=cut,
                workload=tried,
                ranks=ranks,
                time=replace(time, score=time.score + moving["score"], update=time.update + moving["update"]),
                fits=max(rank.peak for rank in ranks) <= memory_bytes,
            )
