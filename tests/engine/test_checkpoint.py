"""Checkpoints know no layout: saved at one and loaded at others, weights and Adam's moments are the same bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from megatron_gil.config import CheckpointSection, OptimizerSection
from megatron_gil.engine.checkpoint import CheckpointError, CheckpointStore
from megatron_gil.engine.files import FileWriter
from megatron_gil.engine.megatron import TrainableModel
from megatron_gil.engine.model_files import num_bytes_written
from megatron_gil.engine.protocol import Part
from megatron_gil.models.slices import SlicedTensors
from megatron_gil.parallel.collectives import gather_objects
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.training.supervised.objectives import sft_loss
from megatron_gil.types import LossSum, Readout, TokenBatch, take_rows
from tests.models.tiny import sample_tokens
from tests.ranks import run_ranks
from tests.training.running import (
    DP2,
    ONE,
    TP2,
    TP2_PP2,
    build,
    full_weights,
    merge,
    parallel,
    world_size,
)

NUM_ROWS, NUM_GROUPS, SAVED = 8, 3, 3
ROW_BYTES = 32 * 4 * 3
"""What padding of the vocabulary and cuts within rows may add: a row of float32 weights for each of three states."""
STATE = {"num_updates": 7, "ema": [None, 0.1 + 0.2]}
TP2_DP2, TP2_PP2_DP2 = {**TP2, "world": 4}, {**TP2_PP2, "world": 8}
CHAIN = [(ONE, False), (DP2, True), (TP2_PP2_DP2, False), (TP2_PP2_DP2, True), (ONE, False)]
Weights = dict[str, dict[str, Tensor]]


def _models(root: Path, layout: ParallelLayout, distributed: bool, dtype: torch.dtype) -> dict[str, TrainableModel]:
    common: dict[str, Any] = {
        "kind": TrainableModel,
        "micro_size": 2,
        "optimizer": OptimizerSection(lr=1e-2, eps=1e-3, weight_decay=0.1),
        "distributed_optimizer": distributed,
        "dtype": dtype,
    }
    return {
        "policy": build(root / "tied", layout, "lm", **common),
        "critic": build(root / "reward_model", layout, "critic", num_groups=NUM_GROUPS, **common),
    }


def _update(models: dict[str, TrainableModel], update: int) -> None:
    generator = torch.Generator().manual_seed(update)
    tokens = torch.randint(4, 61, (NUM_ROWS, 11), generator=generator)
    lengths = torch.randint(5, 11, (NUM_ROWS,), generator=generator)
    is_response = torch.rand(NUM_ROWS, 10, generator=generator) < 0.7
    batch = TokenBatch(
        tokens=tokens,
        lengths=lengths,
        response_mask=is_response & (torch.arange(1, 11) < lengths[:, None]),
        row_ids=torch.arange(NUM_ROWS),
    )
    layout = models["policy"].layout
    share = NUM_ROWS // layout.dp_size
    mine = take_rows(batch, slice(layout.dp_rank * share, (layout.dp_rank + 1) * share))
    models["policy"].update(Part(batch=mine, loss_fn=sft_loss), lr=1e-2)
    models["critic"].update(Part(batch=mine, loss_fn=_critic_loss, per="row"), lr=1e-2)


def _critic_loss(readout: Readout, rows: TokenBatch) -> LossSum:
    assert readout.group_logits is not None
    target = torch.arange(NUM_GROUPS) + 1.0
    total = (readout.values - 1).square().sum() + (readout.group_logits - target).square().sum()
    return LossSum(total=total, metrics={})


def _weights(models: dict[str, TrainableModel]) -> Weights:
    return {role: full_weights(model) for role, model in models.items()}


def _store(directory: Path, layout: ParallelLayout, root: Path, **section: Any) -> CheckpointStore:
    return CheckpointStore(directory, layout, CheckpointSection(**section), tokenizer_dir=root / "policy")


def _link(
    layout: dict[str, Any], distributed: bool, root: Path, source: Path | None, target: Path, dtype: torch.dtype
) -> tuple[Weights, Weights]:
    """Train or load, save, and go on for one update: (weights saved, weights after)."""
    with parallel(layout) as started:
        models = _models(root, started, distributed, dtype)
        if source is None:
            for update in range(SAVED):
                _update(models, update)
        else:
            store = _store(source, started, root)
            path = store.find()
            assert path is not None
            loaded = store.load(path, models)
            assert (loaded.iteration, loaded.state) == (SAVED, STATE)
            assert all(model.num_steps == SAVED for model in models.values())
        saved = _weights(models)
        _store(target, started, root).save(SAVED, models, STATE)
        _update(models, SAVED)
        return saved, _weights(models)


def _run_chain(chain: list[Any], root: Path, directory: Path, dtype: torch.dtype) -> list[tuple[Weights, Weights]]:
    found, source = [], None
    for number, (layout, distributed) in enumerate(chain):
        target = directory / str(number)
        ranks = run_ranks(_link, world_size(layout), layout, distributed, root, source, target, dtype)
        found.append(tuple({role: merge([r[i][role] for r in ranks]) for role in ranks[0][i]} for i in (0, 1)))
        source = target
    return found


@pytest.fixture(scope="module")
def chain(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[Weights, Weights]]]:
    directory = tmp_path_factory.mktemp("chain")
    return directory, _run_chain(CHAIN, world, directory, torch.float32)


def _read_weights(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def _files(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor, put together where it is in slices, which no two files may both hold."""
    found = {}
    for directory in (path for path in checkpoint.iterdir() if path.is_dir()):
        keys = [key for path in directory.glob("*.safetensors") for key in load_file(path)]
        assert len(keys) == len(set(keys)), directory
        stored = SlicedTensors.open(directory, "optimizer" if directory.suffix == ".optimizer" else "model")
        for name in stored.slices:
            whole = tuple(slice(0, size) for size in stored.shape(name))
            found[f"{directory.name}/{name}"] = stored.read(name, whole)
    return found


def test_every_layout_writes_the_same_tensors(chain: Any, world: Path) -> None:
    directory, links = chain
    first = _files(directory / "0" / f"iter_{SAVED:07}")
    for name, tensor in links[0][0]["policy"].items():
        assert torch.equal(first[f"policy/{name}"], tensor)
        for moment in ("exp_avg", "exp_avg_sq"):
            assert first[f"policy.optimizer/{moment}.{name}"].abs().max() > 0, name
    assert {n for n in first if n.startswith("critic/") and "head" in n} == {"critic/group_head.weight"}
    for number in range(1, len(CHAIN)):
        other = _files(directory / str(number) / f"iter_{SAVED:07}")
        assert other.keys() == first.keys()
        assert all(torch.equal(other[name], first[name]) for name in first), CHAIN[number]


def test_training_goes_on_as_if_it_had_not_stopped(chain: Any) -> None:
    links = chain[1]
    for role, expected in links[0][1].items():
        for number, (_, after) in enumerate(links[1:], start=1):
            for name, tensor in expected.items():
                found = after[role][name]
                if CHAIN[number] == CHAIN[0]:
                    assert torch.equal(found, tensor), (role, name)
                else:  # float32 sums in another order
                    assert float((found - tensor).norm() / tensor.norm()) < 1e-6, (CHAIN[number], role, name)


def test_the_policy_is_a_transformers_directory(chain: Any) -> None:
    path = chain[0] / "2" / f"iter_{SAVED:07}" / "policy"  # written by eight ranks
    assert len(list(path.glob("model-*.safetensors"))) > 1
    model = LlamaForCausalLM.from_pretrained(path).eval()
    ours = LlamaForCausalLM(model.config).eval()
    ours.load_state_dict(chain[1][0][0]["policy"], strict=False)
    ours.tie_weights()
    tokens = sample_tokens()
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, ours(tokens).logits)
    assert AutoTokenizer.from_pretrained(path)("sun moon")["input_ids"]


def test_bfloat16_keeps_its_float32_master_weights(world: Path, tmp_path: Path) -> None:
    links = _run_chain([(ONE, False), (DP2, True), (ONE, False)], world, tmp_path, torch.bfloat16)
    first = _files(tmp_path / "0" / f"iter_{SAVED:07}")
    masters = {name: tensor for name, tensor in first.items() if ".optimizer/master." in name}
    for name, master in masters.items():
        weight = first[name.replace(".optimizer/master.", "/")]
        assert master.dtype == torch.float32
        assert torch.equal(master.bfloat16(), weight)
    assert any(not torch.equal(m.bfloat16().float(), m) for m in masters.values()), "masters hold nothing more"
    for number in (1, 2):
        other = _files(tmp_path / str(number) / f"iter_{SAVED:07}")
        assert other.keys() == first.keys()
        assert all(torch.equal(other[name], first[name]) for name in first)
    for role, expected in links[0][1].items():
        assert all(torch.equal(links[2][1][role][name], tensor) for name, tensor in expected.items())


@dataclass
class Traffic:
    """Bytes of tensors through one rank while it saves."""

    weights: int = 0
    """Written."""
    optimizer: int = 0
    """Written."""
    gathered: list[int] = field(default_factory=list)
    """Of each tensor got from other ranks."""
    others: int = 0
    """Collectives that carry a tensor in another way."""


def _save_and_count(layout: dict[str, Any], distributed: bool, root: Path, directory: Path) -> Traffic:
    traffic = Traffic()
    with parallel(layout) as started:
        models = {"policy": _models(root, started, distributed, torch.bfloat16)["policy"]}
        expected = num_bytes_written(models["policy"])
        append, gather = FileWriter.append, dist.gather

        def count_append(files: FileWriter, content: Any) -> None:
            append(files, content)
            if isinstance(content, Tensor):
                traffic.weights += content.nbytes * (content.dtype == torch.bfloat16)
                traffic.optimizer += content.nbytes * (content.dtype == torch.float32)

        def count_gather(tensor: Tensor, parts: list[Tensor] | None, **options: Any) -> None:
            gather(tensor, parts, **options)
            traffic.gathered += [sum(part.nbytes for part in parts)] if parts else []

        def count(tensor: Any, *_: Any, **__: Any) -> None:
            traffic.others += 1

        with (
            patch.object(FileWriter, "append", count_append),
            patch.object(dist, "gather", count_gather),
            patch.object(dist, "all_gather", count),
            patch.object(dist, "broadcast", count),
        ):
            _store(directory, started, root).save(1, models, {})
        assert traffic.weights + traffic.optimizer == expected
    return traffic


@pytest.mark.parametrize("distributed", [False, True])
def test_what_a_rank_writes_falls_as_the_world_grows(world: Path, tmp_path: Path, distributed: bool) -> None:
    """And nothing is written twice, no optimizer state is sent, no gathered tensor is larger than the largest one."""
    largest = {}
    for layout in (ONE, DP2, TP2_DP2, TP2_PP2_DP2):
        size, directory = world_size(layout), tmp_path / str(world_size(layout))
        ranks = run_ranks(_save_and_count, size, layout, distributed, world, directory)
        whole = {name: t.nbytes for name, t in _read_weights(directory / "iter_0000001" / "policy").items()}
        total = sum(whole.values())
        assert sum(rank.weights for rank in ranks) == total
        assert sum(rank.optimizer for rank in ranks) == 6 * total  # three float32 for each bfloat16
        assert max((b for r in ranks for b in r.gathered), default=0) <= max(whole.values()) + ROW_BYTES
        assert sum(sum(rank.gathered) for rank in ranks) <= total + ROW_BYTES
        assert not any(rank.others for rank in ranks)
        largest[size] = (max(rank.weights for rank in ranks), max(rank.optimizer for rank in ranks))
        # Pipeline ranks differ: the first holds the embedding, the last the norm that a head reads.
        per_stage = layout["pipeline_size"] * 6 * total / size
        assert largest[size][1] <= 1.05 * per_stage + ROW_BYTES
        assert largest[size][0] <= per_stage / 6 + max(whole.values())
    for kind in (0, 1):
        assert largest[8][kind] < largest[4][kind] < largest[2][kind] < largest[1][kind], largest


def _choose(layout: dict[str, Any], root: Path, directory: Path) -> list[tuple[Any, bool, list[str]]]:
    """(checkpoint.background, what came of it, notes) where rank 1's host has just enough memory, and a byte less."""
    found = []
    with parallel(layout) as started:
        models = {"policy": _models(root, started, True, torch.bfloat16)["policy"]}
        copies = sum(gather_objects(num_bytes_written(models["policy"]), started))
        for number, (background, short) in enumerate(BACKGROUND):
            notes: list[str] = []
            store = _store(directory / str(number), started, root, background=background)
            free = 2 * copies - short * (started.rank == 1)
            with patch("megatron_gil.engine.checkpoint.available_host_bytes", lambda free=free: free):
                store.begin(1, models, {}, note=notes.append)
            store.finish(wait=True)
            assert store.find() is not None
            found.append((background, store.background, notes))
    return found


BACKGROUND: list[tuple[Any, int]] = [("auto", 0), ("auto", 1), (True, 1), (False, 0)]


def test_written_in_the_background_where_memory_allows_it(world: Path, tmp_path: Path) -> None:
    ranks = run_ranks(_choose, 2, DP2, world, tmp_path)
    for rank, found in enumerate(ranks):
        assert [(asked, chosen) for asked, chosen, _ in found] == [
            ("auto", True),
            ("auto", False),
            (True, True),
            (False, False),
        ]
        assert [len(notes) for _, _, notes in found] == [0, int(rank == 0), 0, 0]
    assert "training waits while checkpoints are written" in ranks[0][1][2][0]
    files = [_files(tmp_path / str(number) / "iter_0000001") for number in range(len(BACKGROUND))]
    for other in files[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in files[0].items())


def _flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "differs from its checksum": ("policy/model.safetensors", _flip_byte),
    "has .* bytes, expected": ("critic.optimizer/optimizer.safetensors", _truncate),
    "state.json is missing": ("state.json", Path.unlink),
    "manifest.json is missing or unreadable": ("manifest.json", Path.unlink),
    "manifest.json is missing or unreadable ": ("manifest.json", _truncate),
}


def _find(directory: Path, root: Path) -> tuple[str | None, list[str], str]:
    notes: list[str] = []
    with parallel(ONE) as layout:
        try:
            found = _store(directory, layout, root).find(note=notes.append)
        except CheckpointError as error:
            return None, notes, str(error)
    return found.name if found else None, notes, ""


def _find_all(directories: list[Path], root: Path) -> list[tuple[str | None, list[str], str]]:
    return [_find(directory, root) for directory in directories]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(chain: Any, world: Path, tmp_path: Path) -> None:
    import re

    whole, directories = chain[0] / "0" / f"iter_{SAVED:07}", []
    for number, (name, harm) in enumerate(DAMAGE.values()):
        directory = tmp_path / str(number)
        for iteration in ("iter_0000003", "iter_0000006"):
            shutil.copytree(whole, directory / iteration)
        harm(directory / "iter_0000006" / name)
        directories.append(directory)
    alone = tmp_path / "alone"
    shutil.copytree(directories[0] / "iter_0000006", alone / "iter_0000006")
    (tmp_path / "none" / ".iter_0000003.tmp").mkdir(parents=True)
    *damaged, only, none = run_ranks(_find_all, 1, [*directories, alone, tmp_path / "none"], world)[0]
    for pattern, (found, notes, _) in zip(DAMAGE, damaged, strict=True):
        assert found == "iter_0000003"
        assert len(notes) == 1
        assert re.search(f"iter_0000006: .*{pattern.strip()}.*trying the one before", notes[0]), notes
    assert only[0] is None
    assert "every checkpoint is damaged" in only[2]
    assert none == (None, [], "")


def _save_many(directory: Path, root: Path) -> list[list[str]]:
    with parallel(ONE) as layout:
        models = {"policy": _models(root, layout, False, torch.float32)["policy"]}
        listings = []
        for name, section, iterations in (
            ("last", {"keep_last": 2}, (1, 2, 3, 4)),
            ("every", {"keep_last": 1, "keep_every": 2}, (1, 2, 3, 4, 5)),
            ("again", {"keep_last": 1}, (9, 2, 3)),  # the run went back behind a damaged 9
            ("twice", {"keep_last": 2}, (4, 4)),
        ):
            store = _store(directory / name, layout, root, **section)
            (directory / name).mkdir()
            for iteration in iterations:
                store.save(iteration, models, {})
            listings.append(sorted(path.name.removeprefix("iter_000000") for path in (directory / name).iterdir()))
        return listings


def test_what_stays(world: Path, tmp_path: Path) -> None:
    last, every, again, twice = run_ranks(_save_many, 1, tmp_path, world)[0]
    assert last == ["3", "4"]
    assert every == ["2", "4", "5"]
    assert again == ["3", "9"], "a damaged later checkpoint pushed out a good one"
    assert twice == ["4"]
    manifest = json.loads((tmp_path / "last" / "iter_0000004" / "manifest.json").read_text())
    assert "state.json" in manifest
    assert "policy/model.safetensors" in manifest
