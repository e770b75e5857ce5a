"""A process of `bench.py gpu`: measures some things of one shape, each written into the results as soon as it is known.

python tools/gpu_measure.py cuda 1.3b train,score,decode RESULTS.json
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_results import Results
from gpu_shapes import SHAPES, TINY_WORK, Plan, Work, decoding_bytes, forward_flops, plan_iteration, plan_train

from megatron_gil import config as c
from megatron_gil.data.rows.order import RowOrder
from megatron_gil.engine.generation import Generator
from megatron_gil.engine.megatron import MegatronModel, TrainableModel
from megatron_gil.engine.protocol import Part
from megatron_gil.models.families import ModelSpec
from megatron_gil.parallel.collectives import all_sum
from megatron_gil.parallel.layout import ParallelLayout, start_parallel, stop_parallel
from megatron_gil.training.build import start_group_head
from megatron_gil.training.ppo.grouping import LearnedGroups
from megatron_gil.training.ppo.iteration import Models, PpoTrainer
from megatron_gil.training.ppo.scorers import RewardModel
from megatron_gil.training.row_source import PromptSource, to_device
from megatron_gil.training.run.out_of_memory import is_out_of_memory
from megatron_gil.training.run.progress import Progress
from megatron_gil.training.run.signals import StopSignal
from megatron_gil.training.supervised.objectives import sft_loss
from megatron_gil.types import PromptBatch, TokenBatch

Found = dict[str, Any]
CPU_MEMORY = 1 << 50  # on the CPU nothing is refused for its size


class Ids:
    """The end cannot be sampled: every response has its full length."""

    def __init__(self, spec: ModelSpec) -> None:
        self.pad_id, self.eos_ids = 0, (spec.vocab_size,)


class RandomPrompts:
    """As many prompts as are asked for, all of one length."""

    group_names = ()

    def __init__(self, spec: ModelSpec, num_tokens: int) -> None:
        self._vocab_size, self._num_tokens = spec.vocab_size, num_tokens

    def collate(self, row_ids: Sequence[int], sample_ids: Sequence[int], **_: Any) -> PromptBatch:
        return _prompts(self._vocab_size, len(row_ids), self._num_tokens, torch.tensor(sample_ids))

    def truncated(self, row_ids: Sequence[int]) -> list[bool]:
        return [False] * len(row_ids)


class Bench:
    """One shape on one device, of one layout."""

    def __init__(self, shape: str, work: Work, layout: ParallelLayout, matmul_flops: float, copy_bytes: float) -> None:
        self.spec, self.work, self.layout = SHAPES[shape], work, layout
        self.matmul_flops, self.copy_bytes = matmul_flops, copy_bytes
        on_gpu = layout.device.type == "cuda"
        self.memory = torch.cuda.get_device_properties(0).total_memory if on_gpu else CPU_MEMORY
        self._planned = plan_train(self.spec, work, self.memory)
        self._model: MegatronModel | None = None

    def train(self) -> Found:
        """Whole updates: forward, backward, optimizer."""
        if self._planned is None:
            return _too_large(self.memory)
        batch = _rows(self.spec, self.work, self.layout)
        model = self._policy()
        assert isinstance(model, TrainableModel)
        seconds, peak = self._repeat(lambda: model.update(Part(batch=batch, loss_fn=sft_loss), lr=1e-6))
        flops = 3 * forward_flops(self.spec, self.work.tokens)
        return {**self._rate(seconds, self.work.rows * self.work.tokens, flops), **_memory(self._planned, peak)}

    def score(self) -> Found:
        """Log-probs of whole rows."""
        model, batch = self._policy(), _rows(self.spec, self.work, self.layout)
        seconds, _ = self._repeat(lambda: model.evaluate(batch))
        found = self._rate(seconds, self.work.rows * self.work.tokens, forward_flops(self.spec, self.work.tokens))
        return found | {"micro_size": model.micro_size}

    def decode(self) -> Found:
        """A token more for every row: what many cost more than one, so that reading the prompts is left out."""
        work, spec = self.work, self.spec
        prompts = _prompts(spec.vocab_size, work.decoded_rows, work.prompt_tokens, torch.arange(work.decoded_rows))
        prompts = to_device(prompts, self.layout)

        def sample(num_tokens: int) -> Callable[[], Any]:
            section = c.SamplingSection(max_new_tokens=num_tokens, micro_size=work.decoded_rows)
            generator = Generator(self._policy(), section, tokenizer=Ids(spec), seed=1)
            return lambda: generator.sample(prompts)

        one, _ = self._repeat(sample(1))
        many, _ = self._repeat(sample(work.new_tokens))
        first = statistics.median(one)
        steps = [max(s - first, 1e-9) / (work.new_tokens - 1) for s in many]
        read = decoding_bytes(spec, work.decoded_rows, work.prompt_tokens + work.new_tokens / 2)
        limit = work.decoded_rows * self.copy_bytes / read
        rates = [work.decoded_rows / step for step in steps]
        return {
            "tokens_per_s": _spread(rates),
            "limit_tokens_per_s": limit,
            "share_of_limit": statistics.median(rates) / limit,
            "ms_per_step": _spread([1e3 * step for step in steps]),
            "rows": work.decoded_rows,
        }

    def iteration(self) -> Found:
        """PPO-GIL from the prompts to both updates."""
        planned = plan_iteration(self.spec, self.work, self.memory)
        if planned is None:
            return _too_large(self.memory)
        trainer = self._trainer(planned.config)
        metrics: list[Found] = []
        seconds, peak = self._repeat(lambda: metrics.append(dict(trainer.iterate(len(metrics)))))
        kept = metrics[-len(seconds) :]
        new_tokens = sum(row["response/tokens"] for row in kept) / len(kept) * self.work.prompts
        new_tokens *= self.work.responses_per_prompt
        parts = {part: _spread([row[f"time/{part}_s"] for row in kept]) for part in ("rollout", "score", "update")}
        rates = _spread([new_tokens / s for s in seconds])
        return {"seconds": _spread(seconds), **parts, "new_tokens_per_s": rates, **_memory(planned, peak)}

    def _policy(self) -> MegatronModel:
        """Trainable where that fits: the same model serves all three measurements."""
        if self._model is None:
            config: Any = self._planned.config if self._planned else None
            self._model = self._trainable("lm", config) if config else self._frozen("lm", 1)
        return self._model

    def _trainable(self, head: Any, config: Any, **kwargs: Any) -> TrainableModel:
        model = TrainableModel(
            self.spec,
            self.layout,
            head=head,
            micro_size=config.batch.micro_size,
            models=config.models,
            optimizer=config.optimizer,
            **kwargs,
        )
        fill(model, seed=1)
        assert model.optimizer is not None
        model.optimizer.reload_master_weights()
        return model

    def _frozen(self, head: Any, micro_size: int) -> MegatronModel:
        models = c.ModelsSection(dtype="bfloat16")
        model = MegatronModel(self.spec, self.layout, head=head, micro_size=micro_size, models=models)
        fill(model, seed=1)
        return model

    def _trainer(self, config: c.PpoConfig) -> PpoTrainer:
        """As the command builds it, but for weights and prompts."""
        ids, micro_size = Ids(self.spec), config.batch.micro_size
        policy = self._trainable("lm", config)
        critic = self._trainable("critic", config, num_groups=config.gil.num_groups)
        start_group_head(critic, config.gil, config.run.seed)
        progress = Progress(StopSignal())
        progress.attend(self.layout)
        dataset: Any = RandomPrompts(self.spec, self.work.iteration_prompt_tokens)
        tokenizer: Any = ids
        rows = config.ppo.num_rows
        order = RowOrder(
            10_000,
            seed=1,
            batch_size=config.ppo.prompts,
            repeats=config.ppo.responses_per_prompt,
            minibatch_size=config.batch.global_size,
        )
        return PpoTrainer(
            config,
            Models(
                policy=policy,
                ref_policy=self._frozen("lm", micro_size),
                critic=critic,
                sampler=Generator(policy, config.sampling, tokenizer=ids, seed=1),
                scorer=RewardModel(self._frozen("score", micro_size)),
            ),
            grouping=LearnedGroups(config.gil, all_sum(self.layout)),
            prompts=PromptSource(dataset, order, self.layout, rows),
            eval_prompts=None,
            pretrain=None,
            tokenizer=tokenizer,
            progress=progress,
            layout=self.layout,
        )

    def _repeat(self, run: Callable[[], Any]) -> tuple[list[float], int | None]:
        """(seconds of each repetition after the warm-up, the most bytes of tensors meanwhile; None on the CPU)."""
        for _ in range(self.work.warm_up):
            run()
        if self.layout.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = time_each(run, self.work.repetitions, self.layout.device)
        return seconds, torch.cuda.max_memory_allocated() if self.layout.device.type == "cuda" else None

    def _rate(self, seconds: list[float], num_tokens: int, flops_per_token: float) -> Found:
        rates = [num_tokens / s for s in seconds]
        flops = statistics.median(rates) * flops_per_token
        return {"tokens_per_s": _spread(rates), "flops": flops, "share_of_product": flops / self.matmul_flops}


def measure_ceilings(work: Work, device: torch.device) -> Found:
    """What the device can do: a large bfloat16 product of random matrices; a large copy, read and write counted."""
    size = work.product_size
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    source = torch.empty(work.copy_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    found = {}
    for name, run, amount in (
        ("matmul_flops", lambda: torch.mm(a, b), 2 * size**3),
        ("copy_bytes_per_s", lambda: target.copy_(source), 2 * work.copy_bytes),
    ):
        for _ in range(3):
            run()
        found[name] = _spread([amount / s for s in time_each(run, 10, device)])
    return found


def time_each(run: Callable[[], Any], repetitions: int, device: torch.device) -> list[float]:
    """Wall-clock seconds; the device has done its work at both ends."""
    synchronize: Callable[[], Any] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = []
    for _ in range(repetitions):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


@torch.no_grad()
def fill(model: MegatronModel, seed: int) -> None:
    """Random weights made where they lie: norms 1, matrices normal with standard deviation 0.02."""
    generator = torch.Generator(device=model.layout.device).manual_seed(seed)
    for parameter in model.module.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=0.02, generator=generator)


def _rows(spec: ModelSpec, work: Work, layout: ParallelLayout) -> TokenBatch:
    tokens = torch.randint(0, spec.vocab_size, (work.rows, work.tokens), generator=torch.Generator().manual_seed(2))
    batch = TokenBatch(
        tokens=tokens,
        lengths=torch.full((work.rows,), work.tokens),
        response_mask=torch.ones(work.rows, work.tokens - 1, dtype=torch.bool),
        row_ids=torch.arange(work.rows),
    )
    return to_device(batch, layout)


def _prompts(vocab_size: int, num_rows: int, num_tokens: int, sample_ids: torch.Tensor) -> PromptBatch:
    generator = torch.Generator().manual_seed(int(sample_ids[0]))
    return PromptBatch(
        tokens=torch.randint(0, vocab_size, (num_rows, num_tokens), generator=generator),
        lengths=torch.full((num_rows,), num_tokens),
        row_ids=torch.arange(num_rows),
        sample_ids=sample_ids,
        known_groups=torch.full((num_rows,), -1),
    )


def _memory(planned: Plan, peak: int | None) -> Found:
    config = planned.config
    found: Found = {"micro_size": config.batch.micro_size, "recompute": config.models.recompute}
    return found | {"planned_bytes": planned.tensor_bytes, "peak_bytes": peak}


def _too_large(memory_bytes: int) -> Found:
    return {"skipped": f"by the plan it does not fit into {memory_bytes / 2**30:.0f} GiB"}


def _spread(values: Sequence[float]) -> Found:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> int:
    device, shape, names, file = sys.argv[1:]
    results = Results.read(Path(file))
    work = TINY_WORK if shape == "tiny" or device == "cpu" else Work()
    if names == "ceilings":
        results.measured["ceilings"] = measure_ceilings(work, torch.device(device))
        results.save()
        return 0
    layout = start_parallel(c.ParallelSection(), seed=1)
    ceilings = results.measured["ceilings"]
    flops, copied = (ceilings[name]["median"] for name in ("matmul_flops", "copy_bytes_per_s"))
    bench = Bench(shape, work, layout, flops, copied)
    for name in names.split(","):
        started = time.perf_counter()
        try:
            found = getattr(bench, name)()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            found = {"skipped": f"out of memory: {' '.join(str(error).split())[:120]}"}
        results.measured[f"{shape} {name}"] = found | {"took_s": round(time.perf_counter() - started, 1)}
        results.save()
        gc.collect()
    stop_parallel()
    return 0


if __name__ == "__main__":
    sys.exit(main())
