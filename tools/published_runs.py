"""The planner's time model against published runs whose lengths are known: `python tools/published_runs.py`.

Each is planned with its sizes and mean lengths, in its own layout where that is told, else in the planner's best; it
recomputes activations where its recipe does, else where the planner must. No assumption is fitted to a run.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_gil.models.families import ModelSpec
from megatron_gil.planning.hardware import GPUS, Assumptions
from megatron_gil.planning.memory import GIB, Cut, Precision, SizedModel
from megatron_gil.planning.presets import SPECS
from megatron_gil.planning.search import find_plans
from megatron_gil.planning.timing import IterationTime, iteration_time
from megatron_gil.planning.workload import RolloutShape, Workload

DEEPSPEED_CHAT = (
    "https://github.com/deepspeedai/DeepSpeed/blob/master/blogs/deepspeed-chat/README.md, tables 1 and 2; "
    "https://github.com/deepspeedai/DeepSpeedExamples, applications/DeepSpeed-Chat/training/step3_rlhf_finetuning: "
    "BenckmarkSetting.md and training_scripts/opt"
)
NEMO_RL = (
    "https://github.com/NVIDIA-NeMo/RL/blob/main/docs/about/performance-summary.md (v0.4, DGX-H100, on-policy) and "
    "examples/configs/recipes/llm/performance"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedRun:
    name: str
    source: str
    policy: ModelSpec
    critic: ModelSpec | None
    """Also of the reward model; None: neither is there."""
    gpu: Literal["a100", "h100"]
    num_gpus: int
    rollout_rows: int
    update_rows: int
    prompt_tokens: int
    new_tokens: int
    seconds: float
    """Of an iteration, measured."""
    recomputes: bool
    """All activations, as its recipe says."""
    cut: Cut | None = None
    """None: not told."""

    def workload(self) -> Workload:
        def model(role: str, spec: ModelSpec, *, trained: bool = False) -> SizedModel:
            head = {"critic": "critic", "reward_model": "score"}.get(role, "lm")
            return SizedModel(role=role, spec=spec, head=head, trained=trained)  # type: ignore[arg-type]

        models = [model("policy", self.policy, trained=True), model("ref_policy", self.policy)]
        if self.critic is not None:
            models += [model("critic", self.critic, trained=True), model("reward_model", self.critic)]
        return Workload(
            models=tuple(models),
            global_size=self.update_rows,
            sequences_per_row=1,
            micro_size=1,
            num_tokens=self.prompt_tokens + self.new_tokens,
            precision=Precision(),
            rollout=RolloutShape(
                num_rows=self.rollout_rows,
                prompt_tokens=self.prompt_tokens,
                new_tokens=self.new_tokens,
                micro_size=128,
                epochs=1,
                num_iterations=1,
            ),
        )


def _opt(hidden_size: int, num_layers: int, num_heads: int) -> ModelSpec:
    """Sizes of OPT: its two matrices of the feed-forward part, 4 times as wide as hidden, are as many parameters as
    three of 8/3."""
    ffn_size = round(8 * hidden_size / 3 / 64) * 64
    sizes = {"hidden_size": hidden_size, "ffn_size": ffn_size, "num_layers": num_layers, "vocab_size": 50_272}
    heads = {"num_heads": num_heads, "num_kv_heads": num_heads, "head_dim": hidden_size // num_heads}
    return replace(SPECS["7b"], **sizes, **heads, tied=True)


def _deepspeed_chat(name: str, policy: ModelSpec, num_gpus: int, hours: float) -> PublishedRun:
    """131.9k queries of 256 + 256 tokens in one epoch; critic and reward model OPT-350M. An iteration has at most 1,024
    rows, and how many it had is not told: with fewer, more of the time would go into decoding."""
    return PublishedRun(
        name=f"DeepSpeed-Chat, OPT-{name}",
        source=DEEPSPEED_CHAT,
        policy=policy,
        critic=_opt(1024, 24, 16),
        gpu="a100",
        num_gpus=num_gpus,
        rollout_rows=1024,
        update_rows=1024,
        prompt_tokens=256,
        new_tokens=256,
        seconds=hours * 3600 / (131_900 / 1024),
        recomputes=True,
    )


def _nemo_rl(
    name: str,
    policy: ModelSpec,
    cut: Cut,
    *,
    new_tokens: int,
    tokens_per_gpu_second: float,
    seconds: float,
    recomputes: bool,
) -> PublishedRun:
    """GRPO, 2,048 responses and four updates of 512 an iteration. The mean prompt follows from the tokens a second."""
    rows = 2048
    tokens = tokens_per_gpu_second * seconds * cut.num_gpus / rows
    return PublishedRun(
        name=f"NeMo-RL, {name}",
        source=NEMO_RL,
        policy=policy,
        critic=None,
        gpu="h100",
        num_gpus=cut.num_gpus,
        rollout_rows=rows,
        update_rows=512,
        prompt_tokens=round(tokens) - new_tokens,
        new_tokens=new_tokens,
        seconds=seconds,
        recomputes=recomputes,
        cut=cut,
    )


OPT_6B, OPT_13B, OPT_30B = _opt(4096, 32, 32), _opt(5120, 40, 40), _opt(7168, 48, 56)
OPT_66B, OPT_175B = _opt(9216, 64, 72), _opt(12288, 96, 96)
QWEN3_32B = replace(
    SPECS["8b"],
    hidden_size=5120,
    ffn_size=25600,
    num_layers=64,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=151_936,
)
RUNS = (
    _deepspeed_chat("6.7B", OPT_6B, 8, 4.1),
    _deepspeed_chat("13B", OPT_13B, 8, 9.0),
    _deepspeed_chat("30B", OPT_30B, 8, 18.0),
    _deepspeed_chat("13B", OPT_13B, 64, 1.25),
    _deepspeed_chat("30B", OPT_30B, 64, 4.0),
    _deepspeed_chat("66B", OPT_66B, 64, 7.5),
    _deepspeed_chat("175B", OPT_175B, 64, 20.0),
    _nemo_rl(
        "Llama 3.1 8B",
        SPECS["8b"],
        Cut(pp_size=2, dp_size=8, distributed_optimizer=True),
        new_tokens=1060,
        tokens_per_gpu_second=1562,
        seconds=97.7,
        recomputes=True,
    ),
    _nemo_rl(
        "Qwen3 32B",
        QWEN3_32B,
        Cut(tp_size=4, pp_size=4, dp_size=2, sequence_parallel=True, distributed_optimizer=True),
        new_tokens=3206,
        tokens_per_gpu_second=540,
        seconds=393.0,
        recomputes=False,
    ),
)


def predict(run: PublishedRun, assume: Assumptions) -> tuple[Cut, IterationTime, bool]:
    """Layout, seconds, and whether the planner finds that it fits into 80 GiB."""
    gpu = GPUS[run.gpu]
    plans = find_plans(run.workload(), run.num_gpus, 80 * GIB, gpu, assume)
    best = next(plan for plan in plans if run.cut in (None, plan.cut))
    time = best.time
    if run.recomputes:
        time = iteration_time(best.workload.with_micro_size(best.workload.micro_size, "full"), best.cut, gpu, assume)
    return best.cut, time, best.fits


def error(run: PublishedRun, time: IterationTime) -> float:
    """0.5: half as much again as measured."""
    return time.total / run.seconds - 1


def table(runs: Sequence[PublishedRun], assume: Assumptions) -> str:
    lines = [
        "| published run | GPUs | rows x (prompt + response) | measured, s | predicted, s | error | rollout, score, "
        "update | layout |",
        "|---" * 8 + "|",
    ]
    errors = []
    for run in runs:
        cut, time, fits = predict(run, assume)
        errors.append(error(run, time))
        columns = [
            run.name,
            f"{run.num_gpus} x {run.gpu.upper()}",
            f"{run.rollout_rows:,} x ({run.prompt_tokens} + {run.new_tokens:,})",
            f"{run.seconds:.0f}",
            f"{time.total:.0f}",
            f"{errors[-1]:+.0%}",
            f"{time.rollout:.0f}, {time.score:.0f}, {time.update:.0f}",
            f"{cut}{'' if fits else ', does not fit'}",
        ]
        lines.append(f"| {' | '.join(columns)} |")
    middle = statistics.median(map(abs, errors))
    lines += ["", f"Median error {statistics.median(errors):+.0%}, median of its size {middle:.0%}."]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(RUNS, Assumptions()))
    print("\nSources:")
    for source in dict.fromkeys(run.source for run in RUNS):
        print(f"- {source}")
