"""The engine: one model on this rank, evaluated and updated through megatron-core's pipeline schedules.

`evaluate` and `update` take this data-parallel rank's rows and cut them into microbatches themselves. A loss is a sum,
and megatron-core divides the accumulated gradient once, by the terms of all ranks and microbatches
(`calculate_per_token_loss`), so that the cut does not change the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_gil.config import ModelsSection, OptimizerSection
from megatron_gil.engine.offload import HostCopies
from megatron_gil.engine.optimizer import ModelOptimizer
from megatron_gil.engine.packing import Microbatch, cut
from megatron_gil.engine.protocol import Part, Update
from megatron_gil.engine.readout import read_output
from megatron_gil.engine.skipped import SkippedUpdate
from megatron_gil.models.families import Head, ModelSpec
from megatron_gil.models.hf import load_weights
from megatron_gil.models.transformer import build_model
from megatron_gil.parallel.collectives import all_sum, gather_objects
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.parallel.pipeline import share_from_last_pp_stage, share_object_from_last_pp_stage
from megatron_gil.types import LossSum, Metrics, Readout, count_terms

CUDA_TOKENS_MULTIPLE = 64
BUCKET_SIZE: int | None = None
"""Parameters whose gradients are summed together where communication overlaps; None: megatron-core's number."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Reader = Callable[[Tensor, Microbatch], Any]
"""(output of the last stage, the microbatch) -> what is read of it."""
Work = tuple[Microbatch, Reader]


@dataclass(frozen=True, slots=True)
class PartLoss:
    """The loss of one part on one microbatch of this rank."""

    part: int
    row_ids: Tensor
    loss: LossSum


@dataclass(frozen=True, slots=True)
class Accumulated:
    """What is known once the gradients are in their buffers."""

    metrics: Metrics
    """Each part's over its own terms, of all ranks."""
    losses: list[PartLoss]
    """This rank's; on the last pipeline rank alone."""
    row_numbers: Tensor | None


class MegatronModel:
    """One model of the run, on this rank. Without an optimizer it is frozen."""

    def __init__(
        self,
        spec: ModelSpec,
        layout: ParallelLayout,
        *,
        head: Head,
        num_groups: int = 0,
        micro_size: int,
        micro_tokens: int | None = None,
        models: ModelsSection | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """micro_size, micro_tokens: how rows are cut into microbatches, see engine/packing.py."""
        models = models or ModelsSection()
        self.spec, self.layout = spec, layout
        self.micro_size, self.micro_tokens = micro_size, micro_tokens
        self.head: Head = head
        self.num_groups = num_groups if num_groups > 1 else 0
        self.dtype = dtype or DTYPES[models.dtype]
        self._offload = models.offload
        self._weights: HostCopies | None = None
        self._module = build_model(
            spec,
            layout,
            head=head,
            num_groups=self.num_groups,
            dtype=self.dtype,
            models=models,
        )
        self._module.requires_grad_(False)
        self._weights_under_way = False
        self._schedule_module: torch.nn.Module = self._module

    @property
    def module(self) -> GPTModel:
        """This pipeline stage, its weights whole."""
        return self._module

    def load(self, directory: Path) -> list[str]:
        """Fill the weights from a Hugging Face directory; the head tensors that it lacks (they stay zero)."""
        return load_weights(self.module, self.spec, directory, self.layout)

    def offload(self) -> None:
        """Let what nobody reads for now wait in host memory, as far as models.offload says: of a frozen model the
        weights, which `evaluate` brings back for as long as it runs."""
        if self._offload != "none":
            self._weights = self._weights or HostCopies(self.module.parameters(), constant=True)
            self._weights.offload()

    @property
    def host_bytes(self) -> int:
        """What `offload` has taken of this process's host memory."""
        return self._weights.num_bytes if self._weights else 0

    def _resident(self) -> AbstractContextManager[None]:
        """Inside, the weights are on the device."""
        return self._weights.restored() if self._weights else nullcontext()

    @torch.no_grad()
    def evaluate(self, batch: Any, *, entropy: bool = False, temperature: float = 1.0) -> Readout:
        """What the model says of this rank's rows; on every tensor- and pipeline-parallel rank. No gradient.

        entropy: read the next-token entropy too (lm head). temperature: of log-probs and entropy.
        """
        microbatches = self._cut(batch)

        def read(output: Tensor, microbatch: Microbatch) -> Readout:
            return self._read(output, microbatch, entropy=entropy, temperature=temperature)

        with self._resident():
            readouts = self._run([(m, read) for m in microbatches], forward_only=True)
        return self._share([m.row_index for m in microbatches], readouts, batch, entropy)

    def _read(self, output: Tensor, microbatch: Microbatch, *, entropy: bool, temperature: float) -> Readout:
        return read_output(
            output,
            microbatch,
            self._module,
            head=self.head,
            vocab_size=self.spec.vocab_size,
            layout=self.layout,
            entropy=entropy,
            temperature=temperature,
        )

    def _cut(self, batch: Any) -> list[Microbatch]:
        return cut(batch, micro_size=self.micro_size, micro_tokens=self.micro_tokens, multiple=self._tokens_multiple())

    def _run(self, work: list[Work], *, forward_only: bool) -> list[Any]:
        """Microbatches through megatron-core's schedule; what the reader returned for each, on the last pp_stage."""

        def forward_step(iterator: Iterator[Work], module: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            microbatch, reader = next(iterator)
            output = module(microbatch.tokens, microbatch.tokens, microbatch.places)
            return output, lambda output, non_loss_data=False: reader(output, microbatch)

        self._schedule_module.train(not forward_only)
        found = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(work),
            model=self._schedule_module,
            num_microbatches=len(work),
            seq_length=1,  # not read: with variable_seq_lengths the stages tell one another each shape
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
        self._weights_under_way = False  # each layer has waited for its own
        return found

    def _tokens_multiple(self) -> int:
        """What the tokens of a microbatch are rounded up to: kernels prefer round numbers, and few different ones."""
        parts = self.layout.tp_size if self.layout.sequence_parallel else 1
        return math.lcm(parts, CUDA_TOKENS_MULTIPLE) if self.layout.device.type == "cuda" else parts

    def _share(self, row_index: list[Tensor], readouts: list[Readout], batch: Any, entropy: bool) -> Readout:
        """The last pipeline rank's readouts as one, on every rank."""
        leading, width = batch.tokens.shape[:-1], batch.tokens.shape[-1] - 1
        shapes: dict[str, tuple[int, ...]] = {
            "lm": {"log_probs": (*leading, width), **({"entropy": (*leading, width)} if entropy else {})},
            "score": {"scores": tuple(leading)},
            "critic": {
                "values": (*leading, width),
                **({"group_logits": (*leading, self.num_groups)} if self.num_groups else {}),
            },
        }[self.head]
        dtype = torch.promote_types(self.dtype, torch.float32)
        shared = {}
        for name, shape in shapes.items():
            mine = None
            if self.layout.is_last_pp_stage:
                mine = torch.zeros(shape, dtype=dtype, device=self.layout.device)
                for index, readout in zip(row_index, readouts, strict=True):
                    part = getattr(readout, name)
                    mine[(index, ..., slice(part.shape[-1])) if part.dim() > len(leading) else index] = part
            shared[name] = share_from_last_pp_stage(mine, shape, dtype, self.layout)
        return Readout(**shared)


class TrainableModel(MegatronModel):
    """A model with gradients and an optimizer."""

    def __init__(
        self,
        spec: ModelSpec,
        layout: ParallelLayout,
        *,
        optimizer: OptimizerSection | None,
        distributed_optimizer: bool = False,
        overlap: bool = False,
        **kwargs: Any,
    ) -> None:
        """optimizer None: gradients only (float64 checks). overlap: of communication with computation."""
        super().__init__(spec, layout, **kwargs)
        self._module.requires_grad_(True)
        mixed = self.dtype == torch.bfloat16
        self.ddp = DistributedDataParallel(
            self._module.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=mixed,
                use_distributed_optimizer=distributed_optimizer,
                overlap_grad_reduce=overlap,
                overlap_param_gather=overlap and distributed_optimizer,
                bucket_size=BUCKET_SIZE,
            ),
            self._module,
        )
        self._module.config.finalize_model_grads_func = finalize_model_grads
        if overlap:
            self._module.config.no_sync_func = self.ddp.no_sync  # only the last microbatch starts the sums
        self._schedule_module = self.ddp
        self.optimizer = None if optimizer is None else ModelOptimizer(self.ddp, optimizer, dtype=self.dtype)
        self.num_steps = 0
        self._skipped: list[SkippedUpdate] = []

    @property
    def module(self) -> GPTModel:
        """This pipeline stage, its weights whole. Collective over data-parallel ranks after an update that overlaps:
        what reads weights outside of a forward pass, which waits for each itself, waits here."""
        if self._weights_under_way:
            self.ddp.start_param_sync(force_sync=True)
            self._weights_under_way = False
        return self._module

    def load(self, directory: Path) -> list[str]:
        absent = super().load(directory)
        if self.optimizer is not None:
            self.optimizer.reload_master_weights()
        return absent

    def offload(self) -> None:
        """Until the next update: the optimizer's state waits in host memory, the gradient buffers are not there."""
        if self._offload in ("rollout", "all"):
            self._free_gradients()
            if self.optimizer is not None:
                self.optimizer.offload()

    @property
    def host_bytes(self) -> int:
        return self.optimizer.host_bytes if self.optimizer is not None else 0

    def _free_gradients(self) -> None:
        # What reads or writes the buffers is queued before this, on the same stream: there is nothing to wait for.
        self.ddp.offload_grad_buffers(synchronize=False, empty_cache=False)

    def set_num_steps(self, num_steps: int) -> None:
        """Continue Adam's bias correction after this many steps."""
        assert self.optimizer is not None
        self.num_steps = num_steps
        self.optimizer.set_num_steps(num_steps)

    def take_skipped(self) -> list[SkippedUpdate]:
        """What stopped each update since the last call, one per skipped update; the same on every rank."""
        skipped, self._skipped = self._skipped, []
        return skipped

    def accumulate(self, *parts: Part) -> Accumulated:
        """Sum the gradient of every part into the gradient buffers and divide it by the terms of the first part."""
        self.ddp.restore_grad_buffers(synchronize=False)  # which does nothing where they are there
        self.ddp.zero_grad_buffer()
        # FP32Optimizer leaves each .grad an alias of its main_grad: the next backward would add the two, twice the
        # first microbatch.
        self._module.zero_grad(set_to_none=True)
        scales = self._scales(parts)
        losses: list[PartLoss] = []
        numbers: list[tuple[Tensor, Tensor]] = []

        def reader(together: list[int]) -> Reader:
            def read(output: Tensor, microbatch: Microbatch) -> Any:
                rows, temperature = microbatch.rows, parts[together[0]].temperature
                readout = self._read(output, microbatch, entropy=False, temperature=temperature)
                found = [PartLoss(i, rows.row_ids, parts[i].loss_fn(readout, rows)) for i in together]
                losses.extend(found)
                wanted = parts[0].row_numbers
                if wanted is not None and together[0] == 0:
                    with torch.no_grad():
                        numbers.append((microbatch.row_index, wanted.read(readout, rows).float()))
                terms = count_terms(rows, parts[0].per) * (together[0] == 0)
                return sum(scales[f.part] * f.loss.total for f in found), terms.to(torch.int), {}

            return read

        passes = _share_passes(parts)
        work = [(m, reader(together)) for together in passes for m in self._cut(parts[together[0]].batch)]
        self._run(work, forward_only=False)
        metrics = self._reduce(parts, losses, [microbatch for microbatch, _ in work])
        return Accumulated(metrics, losses, self._share_numbers(parts[0], numbers))

    def update(self, *parts: Part, lr: float) -> Update:
        """One optimizer step at rate `lr` on the sum of the parts.

        Metrics hold `gradient_norm` before clipping and `skipped` (1 where a NaN or Inf stopped the step on all ranks).
        """
        assert self.optimizer is not None, "this model has no optimizer"
        found = self.accumulate(*parts)
        taken, norm = self.optimizer.step(lr)
        self._weights_under_way = taken and self.ddp.ddp_config.overlap_param_gather
        self.num_steps += taken
        if not taken:
            self._skipped.append(self._explain(norm, found.losses))
        if self._offload == "all":
            self.offload()
        elif self._offload == "rollout":
            self._free_gradients()
        metrics = {**found.metrics, "gradient_norm": norm, "learning_rate": lr, "skipped": float(not taken)}
        return Update(metrics=metrics, row_numbers=found.row_numbers)

    def _scales(self, parts: tuple[Part, ...]) -> list[Any]:
        """What each part's sum is multiplied by, so that the division of the whole gradient by the terms of the first
        part leaves weight / terms of its own."""
        if len(parts) == 1:
            return [parts[0].weight]
        counts = all_sum(self.layout)(torch.stack([count_terms(part.batch, part.per) for part in parts]))
        ratios = [p.weight * counts[0] / count.clamp(min=1) for p, count in zip(parts, counts, strict=True)]
        return [parts[0].weight, *ratios[1:]]

    def _share_numbers(self, part: Part, numbers: list[tuple[Tensor, Tensor]]) -> Tensor | None:
        if part.row_numbers is None:
            return None
        shape = (len(part.batch.tokens), len(part.row_numbers.names))
        mine = None
        if self.layout.is_last_pp_stage:
            mine = torch.empty(shape, device=self.layout.device)
            for index, found in numbers:
                mine[index] = found
        return share_from_last_pp_stage(mine, shape, torch.float32, self.layout)

    def _reduce(self, parts: tuple[Part, ...], losses: list[PartLoss], microbatches: list[Microbatch]) -> Metrics:
        """Each part's metrics over its own terms, of all ranks."""
        names = sorted({(name, found.part) for found in losses for name in found.loss.metrics})
        names = share_object_from_last_pp_stage(names, self.layout)
        zero = torch.zeros((), dtype=torch.float64, device=self.layout.device)
        counts = [count_terms(part.batch, part.per).double() for part in parts]
        tokens = [zero + sum(m.num_tokens for m in microbatches), zero + sum(m.tokens.numel() for m in microbatches)]
        sums = torch.stack([*(zero for _ in names), *counts, *tokens])
        for found in losses:
            terms = [found.loss.metrics[name].double() if part == found.part else zero for name, part in names]
            sums += torch.stack([*terms, *(zero for _ in sums[len(names) :])])
        sums = share_from_last_pp_stage(
            all_sum(self.layout)(sums) if self.layout.is_last_pp_stage else None,
            tuple(sums.shape),
            torch.float64,
            self.layout,
        )
        *values, real, computed = sums.tolist()
        terms = values[len(names) :]
        metrics = {name: total / max(terms[part], 1.0) for (name, part), total in zip(names, values, strict=False)}
        return {**metrics, "batch/padding_fraction": 1 - real / computed}

    def _explain(self, norm: float, losses: list[PartLoss]) -> SkippedUpdate:
        """The most telling rank's account: one that saw a loss that is not finite, else one that saw a gradient."""
        bad = [i for i, found in enumerate(losses) if not math.isfinite(float(found.loss.total))]
        names = [n for n, p in self._module.named_parameters() if not torch.isfinite(p.main_grad).all()]  # type: ignore[attr-defined]
        mine = SkippedUpdate(
            rank=self.layout.rank,
            gradient_norm=norm,
            microbatch=bad[0] if bad else None,
            row_ids=tuple(losses[bad[0]].row_ids.tolist()) if bad else (),
            parameters=tuple(names[:4]),
        )
        accounts = gather_objects(mine, self.layout)
        return max(accounts, key=lambda a: (a.microbatch is not None, bool(a.parameters), -a.rank))


def _share_passes(parts: tuple[Part, ...]) -> list[list[int]]:
    """The numbers of the parts, those together that read one batch at one temperature."""
    passes: dict[tuple[int, float], list[int]] = {}
    for number, part in enumerate(parts):
        passes.setdefault((id(part.batch), part.temperature), []).append(number)
    return list(passes.values())
