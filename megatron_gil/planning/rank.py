"""The memory of one rank, in every phase of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_gil.planning import memory as m
from megatron_gil.planning.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes. What a phase needs is added to what is resident, and what waits on the host meanwhile is taken off."""

    resident: Mapping[str, m.Resident]
    """By the model's role."""
    phases: Mapping[str, Mapping[str, int]]
    """phase -> part -> bytes. Phases: rollout, score, update ROLE, step ROLE. Parts: weights received for sampling,
    KV cache, logits, activations, optimizer."""
    waiting: Mapping[str, m.Resident]
    """phase -> what models.offload keeps off the device in it, of all models together."""
    host: int
    """What models.offload takes of the host's memory."""
    moved: Mapping[str, int]
    """What models.offload moves in an iteration, there and back, while it scores and while it updates."""

    @property
    def held(self) -> int:
        return sum(model.total for model in self.resident.values())

    def held_in(self, phase: str) -> int:
        return self.held - self.waiting[phase].total

    def phase_total(self, phase: str) -> int:
        return self.held_in(phase) + sum(self.phases[phase].values()) + m.OVERHEAD_BYTES

    @property
    def worst_phase(self) -> str:
        return max(self.phases, key=self.phase_total)

    @property
    def peak(self) -> int:
        """Estimate of the most that the rank needs at once, overhead included."""
        return self.phase_total(self.worst_phase)


def rank_memory(workload: Workload, cut: m.Cut, pp_rank: int) -> RankMemory:
    """The memory of one pipeline rank; its tensor- and data-parallel ranks all need the same."""
    precision, rows = workload.precision, workload.rows(cut)
    resident = {model.role: m.resident(model, cut, pp_rank, precision) for model in workload.models}
    phases: dict[str, dict[str, int]] = {}
    waiting: dict[str, m.Resident] = {}

    def wait(phase: str) -> m.Resident:
        each = [m.waiting(model, resident[model.role], workload.offload, phase) for model in workload.models]
        return sum(each, start=m.Resident(weights=0))

    if workload.rollout is not None:
        policy = workload.models[0]
        decoded = workload.decoded_rows(cut)
        prompts = m.Rows(num_rows=decoded.num_rows, num_tokens=workload.rollout.prompt_tokens)
        phases["rollout"] = {
            "weights": m.received_weights(policy, cut, pp_rank, precision),
            "KV cache": m.key_value_cache(policy, cut, decoded, precision),
            "logits": m.sampling_work(policy, decoded.num_rows),
            "activations": m.prefill_work(policy, cut, prompts, precision),
        }
        waiting["rollout"] = wait("rollout")
    frozen = [model for model in workload.models if not model.trained]
    read = workload.models if workload.rollout is not None else frozen
    if read:
        work = {one.role: m.forward_work(one, cut, pp_rank, rows, precision) for one in read}
        worst = max(work, key=lambda role: work[role] - wait(f"score {role}").total)
        phases["score"], waiting["score"] = {"activations": work[worst]}, wait(f"score {worst}")
    for model in workload.models:
        if model.trained:
            phases[f"update {model.role}"] = m.update_peak(model, cut, pp_rank, rows, precision)
            phases[f"step {model.role}"] = {}  # a fused AdamW makes nothing for a moment
            waiting |= {f"{act} {model.role}": wait(f"{act} {model.role}") for act in ("update", "step")}
    return RankMemory(resident=resident, phases=phases, waiting=waiting, **_host(workload, resident))


def _host(workload: Workload, resident: Mapping[str, m.Resident]) -> dict[str, Any]:
    """`host` and `moved` of a RankMemory."""
    rollout, offload = workload.rollout, workload.offload
    frozen = [model.role for model in workload.models if not (model.trained or model.stays)]
    weights = sum(resident[role].weights for role in frozen) if offload != "none" else 0
    updates = rollout.epochs * rollout.num_rows // workload.global_size if rollout else 1
    times = {"rollout": 1 if rollout else 0, "all": updates}.get(offload, 0)
    state = sum(held.optimizer for held in resident.values())
    return {"host": weights + state * (times > 0), "moved": {"score": weights, "update": 2 * times * state}}
