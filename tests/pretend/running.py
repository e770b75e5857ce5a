"""Commands on pretended GPUs, in ranks of their own, as the command line runs them."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_gil import cli
from megatron_gil.engine.optimizer import ModelOptimizer
from megatron_gil.models import transformer
from megatron_gil.training.ppo.iteration import PpoTrainer
from megatron_gil.training.supervised import objectives
from megatron_gil.training.supervised.trainer import SupervisedTrainer
from tests.pretend.device import pretended_gpus
from tests.pretend.report import Report, Sync
from tests.ranks import run_ranks
from tests.training.running import use_cache

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "tp2": (2, ["parallel.tensor_size=2"]),
    "tp2_sp": (2, ["parallel.tensor_size=2", "parallel.sequence_parallel=true"]),
    "pp2": (2, ["parallel.pipeline_size=2"]),
    "dp2": (2, []),
}
"""name -> (ranks, settings)."""


Change = Callable[[], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class Answer:
    """What one rank says of the commands it ran."""

    codes: list[int]
    said: str
    num_launches: int
    iterations: list[Counter[Sync]] = field(default_factory=list)
    """The synchronisations of each iteration of a training command."""


def settings(command: str, root: Path, run: Path) -> list[str]:
    """A short run on the tiny world: two updates of two microbatches on one rank."""
    policy, reward_model = f"models.policy={root / 'policy'}", f"models.reward_model={root / 'reward_model'}"
    data = {"sft": "demonstrations", "score": "answers"}
    data |= dict.fromkeys(("reward", "dpo", "evaluate-reward"), "preferences")
    limits = ["data.max_tokens=32", "data.max_prompt_tokens=24", "parallel.timeout_s=600"]
    sampling = ["sampling.max_new_tokens=4", "sampling.micro_size=4"]
    common = [command, f"data.train={root / data.get(command, 'prompts')}.jsonl", *limits]
    if command == "generate":
        return [*common, *sampling, policy, f"output={run}.jsonl"]
    if command == "score":
        return [*common, reward_model, f"output={run}.jsonl"]
    if command == "evaluate-reward":
        return [*common, reward_model, f"output={run}.json"]
    train = [
        f"run.dir={run}",
        "batch.global_size=8",
        "batch.micro_size=4",
        "optimizer.lr=0.01",
        "log.tensorboard=false",
        "log.samples_every=1",
    ]
    if command == "audit":
        train = [t for t in train if not t.startswith("run.dir=")]
        rows = f"audit.pairs={root / 'preferences'}.jsonl"
        own = [rows, "audit.iterations=1", "audit.responses=16", "gil.min_group_mass=0", f"output={run}.json"]
        return [*common, *train, *sampling, policy, reward_model, "ppo.prompts=16", *own]
    if command != "ppo":
        model = f"models.reward_model={root / 'policy'}" if command == "reward" else policy
        return [*common, *train, model, "train.updates=2"]
    ppo = ["ppo.iterations=1", "ppo.prompts=16", "critic_optimizer.lr=0.01", "gil.warmup_updates=1"]
    return [*common, *train, *sampling, policy, reward_model, *ppo]


def run_commands(
    root: Path,
    world_size: int,
    commands: list[list[str]],
    *,
    pretend: bool = True,
    num_gpus: int | None = None,
    change: Change | None = None,
) -> list[Answer]:
    """Commands one after the other in fresh ranks; what each rank says.

    num_gpus: of the machine; None: one for each rank. change: what is patched in the package meanwhile.
    """
    return run_ranks(_run, world_size, root, commands, pretend, num_gpus, change)


def _run(root: Path, commands: list[list[str]], pretend: bool, num_gpus: int | None, change: Change | None) -> Answer:
    use_cache(root)
    said, iterations = io.StringIO(), []
    with contextlib.ExitStack() as stack:
        report = stack.enter_context(pretended_gpus(num_gpus)) if pretend else Report()
        stack.enter_context(contextlib.redirect_stderr(said))
        stack.enter_context(contextlib.redirect_stdout(said))
        stack.enter_context(_iterations_counted(report, iterations))
        if change is not None:
            stack.enter_context(change())
        codes = [cli.main(c) for c in commands]
    return Answer(codes, said.getvalue(), report.num_launches, iterations)


@contextlib.contextmanager
def _iterations_counted(report: Report, found: list[Counter[Sync]]) -> Iterator[None]:
    def counted(iterate: Any) -> Any:
        def iterate_and_count(self: Any, iteration: int) -> Any:
            before = report.syncs.copy()
            metrics = iterate(self, iteration)
            found.append(report.syncs - before)
            return metrics

        return iterate_and_count

    with (
        mock.patch.object(PpoTrainer, "iterate", counted(PpoTrainer.iterate)),
        mock.patch.object(SupervisedTrainer, "iterate", counted(SupervisedTrainer.iterate)),
    ):
        yield


@contextlib.contextmanager
def losses_not_a_number() -> Iterator[None]:
    """Of sft."""
    sft_loss = objectives.sft_loss

    def loss(readout: Any, rows: Any) -> Any:
        found = sft_loss(readout, rows)
        return replace(found, total=found.total * float("nan"))

    with mock.patch.object(objectives, "sft_loss", loss):
        yield


@contextlib.contextmanager
def kernels_as_on_the_cpu() -> Iterator[None]:
    """Neither Adam nor SwiGLU in one kernel, rounded lengths nor repeated key heads, which round otherwise."""
    with (
        mock.patch.object(ModelOptimizer, "_fuse"),
        mock.patch("megatron_gil.models.kernels._compiles", return_value=False),
        mock.patch("megatron_gil.engine.megatron.CUDA_TOKENS_MULTIPLE", 1),
        mock.patch("megatron_gil.models.attention.expands_kv_heads", return_value=False),
    ):
        yield


@contextlib.contextmanager
def models_left_where_they_were_made() -> Iterator[None]:
    """megatron's layers on the GPU, and the norms between them not."""
    with mock.patch.object(transformer.GPTModel, "to", lambda model, device: model):
        yield
