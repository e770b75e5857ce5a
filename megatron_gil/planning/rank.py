"""The memory of one rank, in every phase of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_gil.planning import memory as m
from megatron_gil.planning.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes. What a phase needs is added to what is resident all the time."""

    resident: Mapping[str, m.Resident]
    """By the model's role."""
    phases: Mapping[str, Mapping[str, int]]
    """phase -> part -> bytes. Phases: rollout, score, update ROLE, step ROLE. Parts: weights received for sampling,
    KV cache, logits, activations, optimizer."""

    @property
    def held(self) -> int:
        return sum(model.total for model in self.resident.values())

    def phase_total(self, phase: str) -> int:
        return self.held + sum(self.phases[phase].values()) + m.OVERHEAD_BYTES

    @property
    def worst_phase(self) -> str:
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak(self) -> int:
        """Estimate of the most that the rank needs at once, overhead included."""
        return self.phase_total(self.worst_phase)


def rank_memory(workload: Workload, cut: m.Cut, pp_rank: int) -> RankMemory:
    """The memory of one pipeline rank; its tensor- and data-parallel ranks all need the same."""
    precision, rows = workload.precision, workload.rows(cut)
    phases: dict[str, dict[str, int]] = {}
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
    frozen = [model for model in workload.models if not model.trained]
    if workload.rollout is not None or frozen:
        read = workload.models if workload.rollout is not None else frozen
        phases["score"] = {"activations": max(m.forward_work(one, cut, pp_rank, rows, precision) for one in read)}
    for model in workload.models:
        if model.trained:
            phases[f"update {model.role}"] = {
                "activations": m.saved_activations(model, cut, pp_rank, rows, precision)
                + m.backward_work(model, cut, pp_rank, rows, precision),
                "logits": m.saved_logits(model, cut, pp_rank, rows, precision),
            }
            phases[f"step {model.role}"] = {"optimizer": m.step_work(model, cut, pp_rank)}
    return RankMemory(
        resident={model.role: m.resident(model, cut, pp_rank, precision) for model in workload.models}, phases=phases
    )
