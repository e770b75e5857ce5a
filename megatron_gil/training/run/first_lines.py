"""The first lines of a run: what is about to happen, as rows of a name and a value. To say more, add a row."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_gil.config import BatchPlan, CommandConfig, PpoConfig, TrainConfig
from megatron_gil.data.rows.dataset import RowDataset
from megatron_gil.engine.megatron import MegatronModel, TrainableModel
from megatron_gil.models.kernels import Kernels, attention_backend
from megatron_gil.models.uses import ModelUse
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.planning.memory import GIB, Cut, SizedModel, num_parameters
from megatron_gil.training.check_run import CheckedRun, describe_rewards, path_of

FirstRow = tuple[str, str]
WIDTH = 80


def first_rows(
    config: CommandConfig,
    layout: ParallelLayout,
    *,
    where: Path,
    models: Mapping[str, MegatronModel],
    checked: CheckedRun,
    length: str,
) -> list[FirstRow]:
    """Rows of any command. where: what it writes. models: by role, built. length: how much there is to do. Empty but
    on rank 0."""
    if not layout.is_main:
        return []
    rows = [("writes", str(where)), ("device", _device(layout)), ("layout", _layout(config, layout))]
    rows += [(use.role, _model(config, use, models[use.role])) for use in checked.uses]
    rows += [("scores", describe_rewards(config))] if checked.function else []
    if models:
        rows += _kernels(config, layout, list(models.values()))
        rows += _offload(config, models)
    rows += [(key, _data(config, key, found)) for key, found in checked.data.items()]
    return [*rows, ("to do", length), ("memory", _memory(layout)), *(("note", note) for note in checked.notes)]


def print_rows(rows: Sequence[FirstRow], layout: ParallelLayout) -> None:
    """On stderr of rank 0, in at most 80 columns; only what cannot be broken, such as a path, is longer."""
    if not layout.is_main:
        return
    width = max(len(name) for name, _ in rows) + 2
    for name, value in rows:
        first, rest = f"{name:<{width}}", " " * width
        lines = textwrap.wrap(
            value,
            WIDTH,
            initial_indent=first,
            subsequent_indent=rest,
            break_long_words=False,
            break_on_hyphens=False,
        )
        print("\n".join(lines), file=sys.stderr)


def _device(layout: ParallelLayout) -> str:
    if layout.device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} thread(s) a process"
    found = torch.cuda.get_device_properties(layout.device)
    return f"{found.name}, {found.total_memory / GIB:.0f} GiB"


def _kernels(config: CommandConfig, layout: ParallelLayout, models: Sequence[MegatronModel]) -> list[FirstRow]:
    """What the models really run on."""
    model = models[0]
    attention = attention_backend(
        model.dtype,
        num_heads=model.spec.num_heads,
        num_kv_heads=model.spec.num_kv_heads,
        head_dim=model.spec.head_dim,
        device=layout.device,
    )
    if layout.device.type == "cuda" and model.spec.window is not None:
        attention += f", memory-efficient for rows above the window of {model.spec.window}"
    text = f"{Kernels.choose(config.models, layout.device).describe()}; attention: {attention}"
    text += "; deterministic" if layout.deterministic and layout.device.type == "cuda" else ""
    rows = [("kernels", text)]
    rows += [("optimizer", m.optimizer.kind) for m in models if isinstance(m, TrainableModel) and m.optimizer][:1]
    if layout.device.type == "cuda" and model.dtype == torch.float32:
        text = "models.dtype=float32 leaves most of a GPU's speed unused; bfloat16 is what it is built for"
        rows.append(("warning", text))
    return rows


def _offload(config: CommandConfig, models: Mapping[str, MegatronModel]) -> list[FirstRow]:
    """What waits in host memory, with models.offload."""
    offload = config.models.offload
    if offload == "none" or not isinstance(config, TrainConfig):
        return []
    trained = [role for role, model in models.items() if isinstance(model, TrainableModel)]
    frozen = [role for role in models if role not in trained]
    parts = [f"weights of {', '.join(frozen)} while they are not read"] if frozen else []
    when = {"rollout": "while responses are sampled and scored", "all": "but in its own steps"}
    if offload == "all" or (offload == "rollout" and isinstance(config, PpoConfig)):
        parts.append(f"optimizer state of {', '.join(trained)} {when[offload]}")
    size = sum(model.host_bytes for model in models.values()) / GIB
    text = (
        f"{'; '.join(parts)}: {size:.1f} GiB of this process" if parts else "nothing: all that is there is always read"
    )
    return [("on the host", text)]


def _layout(config: CommandConfig, layout: ParallelLayout) -> str:
    parallel = config.parallel
    text = f"{layout.world_size} process(es): {layout.tp_size} tensor- x {layout.pp_size} pipeline- x {layout.dp_size} "
    text += "data-parallel"
    text += ", sequence-parallel" if parallel.sequence_parallel else ""
    text += ", optimizer sharded" if parallel.distributed_optimizer else ""
    if isinstance(config, TrainConfig):
        plan = BatchPlan.of(layout.world_size, parallel, config.batch)
        text += f"; an update is {plan.microbatches} on each"
    return text


def _model(config: CommandConfig, use: ModelUse, model: MegatronModel) -> str:
    dtype = str(model.dtype).removeprefix("torch.")
    does = "trained" if use.trained else "frozen"
    sized = SizedModel(role=use.role, spec=model.spec, head=use.head, trained=use.trained, num_groups=use.num_groups)
    count = count_text(num_parameters(sized, Cut(), 0))
    return f"{count} parameters, {dtype}, {does}, from {path_of(config, f'models.{use.key}')}"


def _data(config: CommandConfig, key: str, rows: RowDataset[Any]) -> str:
    """The rows of a file, and what is cut of them to fit."""
    return f"{path_of(config, key)}: {rows.describe()}"


def _memory(layout: ParallelLayout) -> str:
    """Of rank 0, after the models are built and before the first batch."""
    if layout.device.type == "cpu":
        used, whole = psutil.Process().memory_info().rss, psutil.virtual_memory().total
        return f"{used / GIB:.1f} GiB in this process, of {whole / GIB:.1f} GiB of the machine"
    free, whole = torch.cuda.mem_get_info(layout.device)
    return f"{(whole - free) / GIB:.1f} GiB of the GPU's {whole / GIB:.1f} GiB taken before the first batch"


def count_text(count: int) -> str:
    """Three digits and a unit: 6.74 billion."""
    for size, unit in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
