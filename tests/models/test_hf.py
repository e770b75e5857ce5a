"""The weight map: what was loaded comes back bit for bit at every layout; and the errors of a wrong directory."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_gil.config import ConfigError
from megatron_gil.models.convert.weight_files import read_safetensors
from megatron_gil.models.families import ModelSpec, read_spec
from megatron_gil.models.hf import WeightMap, load_weights
from megatron_gil.models.hf_files import HfTensors
from megatron_gil.models.transformer import build_model
from tests.gathered import full_tensors
from tests.models.running import LAYOUTS, layout_name, load_model, parallel, world_size
from tests.models.tiny import FAMILIES, VARIANTS, make_model
from tests.ranks import run_ranks

NAMES = {"tied": "lm", "untied": "lm", "score": "critic", **dict.fromkeys(FAMILIES, "lm")}
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("llamas")
    make_model(root / "tied", tie_word_embeddings=True)
    make_model(root / "untied", max_shard_size="20KB")  # several files and an index
    make_model(root / "score", head="score")
    for name in FAMILIES:
        make_model(root / name, **VARIANTS[name])
    return root


def _read_all(hf_dir: Path) -> dict[str, Tensor]:
    return {k: v for path in sorted(hf_dir.glob("*.safetensors")) for k, v in load_file(path).items()}


def _round_trip(layout: dict[str, Any], root: Path) -> dict[str, dict[str, Tensor]]:
    with parallel(layout) as started:
        return {name: _read_back(*load_model(root / name, started, head), started) for name, head in NAMES.items()}  # type: ignore[arg-type]


def _read_back(spec: ModelSpec, model: Any, layout: Any) -> dict[str, Tensor]:
    """Full tensors, after a check that cutting them again gives this rank's parameters."""
    weights = WeightMap(spec, model, layout)
    written = {}
    for entry in weights.entries:
        parameter = model.get_parameter(entry.param_name).detach()
        full = full_tensors(weights, entry.param_name, parameter)
        assert tuple(full) == entry.hf_names
        assert tuple(tuple(t.shape) for t in full.values()) == weights.full_shape(entry)
        local = weights.to_local(entry.param_name, lambda name, index, full=full: full[name][index])
        assert torch.equal(local, parameter), entry.param_name
        _check_pieces(weights, entry.param_name, parameter.flatten(), full)
        if not entry.is_copy:
            written.update(full)
    return written


def _check_pieces(weights: WeightMap, name: str, parameter: Tensor, full: dict[str, Tensor]) -> None:
    """Cut anywhere, within rows and blocks too, the pieces are what the whole tensors hold, and all of it once."""
    cuts = torch.randint(0, parameter.numel() + 1, (5,), generator=torch.Generator().manual_seed(1)).tolist()
    found, num_elements = torch.zeros_like(parameter), 0
    for start, end in pairwise(sorted([0, *cuts, parameter.numel()])):
        for piece in weights.pieces(name, start, end):
            value = full[piece.hf_name][piece.index]
            assert torch.equal(piece.of(parameter[start:end], start), value)
            assert piece.whole == full[piece.hf_name].shape
            piece.put(value, found[start:end], start)
            num_elements += value.numel()
    assert torch.equal(found, parameter)  # where no piece is, rows that pad, there are zeros
    share = 1 if weights.entry(name).weight.shard_dim is None else weights.layout.tp_size
    padding = parameter.numel() * share - sum(tensor.numel() for tensor in full.values())
    assert parameter.numel() - num_elements in (0, padding)


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
def test_round_trip_is_bitwise(layout: dict[str, Any], root: Path) -> None:
    ranks = run_ranks(_round_trip, world_size(layout), layout, root)
    for name in NAMES:
        expected = _read_all(root / name)
        found: dict[str, Tensor] = {}
        for rank in ranks:
            for key, tensor in rank[name].items():
                assert key not in found or torch.equal(found[key], tensor), f"ranks differ in {key}"
                found[key] = tensor
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_sharded_directory_has_several_files(root: Path) -> None:
    assert len(list((root / "untied").glob("model-*.safetensors"))) > 2


def _load_heads(hf_dir: Path, num_groups: int) -> tuple[list[str], bool]:
    with parallel(LAYOUTS[0]) as layout:
        spec = read_spec(hf_dir)
        model: Any = build_model(spec, layout, head="critic", num_groups=num_groups, dtype=torch.bfloat16)
        absent = load_weights(model, spec, hf_dir, layout)
        return absent, bool(model.output_layer.score.weight.any())


@pytest.mark.parametrize(
    ("name", "num_groups", "absent"),
    [("untied", 2, ["score.weight", "group_head.weight"]), ("score", 2, ["group_head.weight"]), ("score", 1, [])],
)
def test_absent_heads_are_named(name: str, num_groups: int, absent: list[str], root: Path) -> None:
    found, score_is_filled = run_ranks(_load_heads, 1, root / name, num_groups)[0]
    assert found == absent
    assert score_is_filled == ("score.weight" not in absent)


def _load_error(hf_dir: Path) -> str:
    with parallel(LAYOUTS[0]) as layout:
        try:
            load_model(hf_dir, layout)
        except ConfigError as error:
            return str(error)
    return ""


def _copy_changed(source: Path, target: Path, tensors: dict[str, Tensor]) -> Path:
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(tensors, target / "model.safetensors")
    return target


def test_a_missing_tensor_is_named(root: Path, tmp_path: Path) -> None:
    tensors = _read_all(root / "tied")
    del tensors["model.layers.2.self_attn.k_proj.weight"]
    message = run_ranks(_load_error, 1, _copy_changed(root / "tied", tmp_path / "copy", tensors))[0]
    assert "model.layers.2.self_attn.k_proj.weight" in message
    assert str(tmp_path) in message
    assert "\n" not in message


def test_a_tensor_of_another_shape_is_named_with_both_shapes(root: Path, tmp_path: Path) -> None:
    tensors = _read_all(root / "tied")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(47, 32)
    message = run_ranks(_load_error, 1, _copy_changed(root / "tied", tmp_path / "copy", tensors))[0]
    for part in ("model.safetensors", "model.layers.0.mlp.up_proj.weight", "[47, 32]", "[48, 32]"):
        assert part in message


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}'])
def test_a_broken_index_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConfigError, match=r"index\.json.*weight_map"):
        HfTensors.open(tmp_path)


def test_a_missing_or_cut_file_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.safetensors: not found"):
        HfTensors.open(tmp_path)
    whole = (root / "tied" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"model\.safetensors: cannot be read"):
        HfTensors.open(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"model-00001-of-00001\.safetensors: not found"):
        HfTensors.open(tmp_path).shape("a")
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(whole)
    with pytest.raises(ConfigError, match=r"model-00001-of-00001\.safetensors: no tensor a, which the index says"):
        HfTensors.open(tmp_path).shape("a")


@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
def test_the_files_that_are_read_are_those_that_are_checked(index: bool, root: Path, tmp_path: Path) -> None:
    """A model.safetensors before what an index names, as in transformers; several files without an index."""
    copy, expected = shutil.copytree(root / "untied", tmp_path / "copy"), _read_all(root / "untied")
    if index:
        save_file({name: tensor + 1 for name, tensor in expected.items()}, copy / "model.safetensors")
    else:
        (copy / "model.safetensors.index.json").unlink()
    checked = {file.path for file in read_safetensors(copy)}
    tensors = HfTensors.open(copy)
    assert set(tensors.files.values()) == checked
    assert torch.equal(tensors.read(NORM, (slice(0, 32),)), expected[NORM] + index)


def test_only_files_that_are_read_are_opened(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "untied", tmp_path / "copy")
    tensors = HfTensors.open(tmp_path / "copy")
    needed = tensors.files[NORM]
    for path in set(tensors.files.values()) - {needed}:
        path.unlink()
    assert tensors.read(NORM, (slice(3, 7),)).shape == (4,)
