"""The model at every layout against transformers' on the same weights: outputs, then every gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_gil.models.hf import WeightMap
from megatron_gil.parallel.layout import ParallelLayout
from tests.gathered import full_tensors
from tests.models.running import LAYOUTS, forward, gradients, layout_name, load_model, parallel, world_size
from tests.models.tiny import FAMILIES, SIZES, VARIANTS, make_model, sample_tokens
from tests.ranks import run_ranks

WHOLE = (LAYOUTS[0], LAYOUTS[5], LAYOUTS[6])  # the others cut a model in part of the ways that these do
CUTS = [each if each in WHOLE else pytest.param(each, marks=pytest.mark.long) for each in LAYOUTS]
NUM_GROUPS = 3
LMS = ("tied", "grouped_heads", *FAMILIES)
HEADS = {**dict.fromkeys(LMS, "lm"), "score": "critic"}  # whose gradients are compared
# float32 sums in another order; logits reach 2 to 4.
OUTPUT_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("llamas")
    models = {name: make_model(root / name, **sizes) for name, sizes in VARIANTS.items()}
    models["score"] = make_model(root / "score", head="score")
    return root, models


def _outputs(layout: dict[str, Any], root: Path, names: list[str]) -> dict[str, Tensor | None]:
    with parallel(layout) as started, torch.no_grad():
        heads: dict[str, Any] = {name: "score" if name == "score" else "lm" for name in names}
        return {n: forward(load_model(root / n, started, heads[n])[1], sample_tokens()) for n in names}


@pytest.mark.parametrize("layout", CUTS, ids=layout_name)
def test_outputs_at_every_position(layout: dict[str, Any], llamas: tuple[Path, dict[str, Any]]) -> None:
    root, models = llamas
    ranks = run_ranks(_outputs, world_size(layout), layout, root, list(models))
    last_stage = ranks[-layout["tensor_size"] :]
    tokens = sample_tokens()[1:]
    for name, model in models.items():
        parts = [rank[name] for rank in last_stage]
        with torch.no_grad():
            hidden = model.model(tokens).last_hidden_state
            expected = model.score(hidden) if name == "score" else model.lm_head(hidden)
        if name == "score":
            assert torch.equal(parts[0], parts[-1]), "the head's output differs between tensor-parallel ranks"
            found = parts[0]
        else:
            found = torch.cat(parts, dim=-1)[..., : SIZES["vocab_size"]]
            assert expected.abs().max() > 2, "the comparison is of numbers too small to mean anything"
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, atol=OUTPUT_TOLERANCE, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def _direction(size: int) -> Tensor:
    return torch.linspace(-1, 1, size, dtype=torch.float64)


def _full_gradients(layout: dict[str, Any], root: Path, dtype: torch.dtype, recompute: str, *names: str) -> Any:
    with parallel(layout) as started:
        return {name: _model_gradients(started, root / name, HEADS[name], dtype, recompute) for name in names}


def _model_gradients(layout: ParallelLayout, hf_dir: Path, head: Any, dtype: torch.dtype, recompute: str) -> Any:
    spec, model = load_model(hf_dir, layout, head, NUM_GROUPS, dtype, recompute)
    if head == "critic" and layout.is_last_pp_stage:
        with torch.no_grad():
            model.output_layer.group_head.weight.copy_(_group_weight())
    width = spec.padded_vocab_size(layout.tp_size) // layout.tp_size
    size, offset = (spec.vocab_size, layout.tp_rank * width) if head == "lm" else (1 + NUM_GROUPS, 0)
    grads = gradients(model, sample_tokens(), _direction(size).to(dtype), offset)
    weights = WeightMap(spec, model, layout)
    return {k: v for name, grad in grads.items() for k, v in full_tensors(weights, name, grad).items()}


def _group_weight() -> Tensor:
    return torch.linspace(-0.5, 0.7, NUM_GROUPS * SIZES["hidden_size"]).view(NUM_GROUPS, -1)


def _merge(ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All ranks' gradients; a tensor that several hold must be the same on each, bit for bit."""
    merged: dict[str, Tensor] = {}
    for rank in ranks:
        for name, grad in rank.items():
            assert name not in merged or torch.equal(merged[name], grad), f"ranks differ in {name}"
            merged[name] = grad
    return merged


def _transformers_gradients(model: Any, head: str) -> dict[str, Tensor]:
    model.zero_grad()
    hidden = model.model(sample_tokens()).last_hidden_state
    if head == "lm":
        (model.lm_head(hidden) * _direction(SIZES["vocab_size"]).float()).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}
    groups = _group_weight().requires_grad_()
    output = torch.cat([model.score(hidden), hidden @ groups.T], dim=-1)
    (output * _direction(1 + NUM_GROUPS).float()).sum().backward()
    assert groups.grad is not None
    return {"group_head.weight": groups.grad, **{name: p.grad.clone() for name, p in model.named_parameters()}}


@pytest.mark.parametrize("layout", CUTS, ids=layout_name)
def test_every_gradient(layout: dict[str, Any], llamas: tuple[Path, dict[str, Any]]) -> None:
    root, models = llamas
    ranks = run_ranks(_full_gradients, world_size(layout), layout, root, torch.float32, "none", *HEADS)
    for name, head in HEADS.items():
        found, expected = _merge([rank[name] for rank in ranks]), _transformers_gradients(models[name], head)
        assert found.keys() == expected.keys()
        for key, grad in expected.items():
            # float32 sums in another order, relative to the tensor's largest element
            largest = float(grad.abs().max())
            torch.testing.assert_close(found[key], grad, atol=1e-5 * largest, rtol=0, msg=lambda m, k=key: f"{k}: {m}")


def test_float64_gradients_depend_neither_on_the_layout_nor_on_recomputation(
    llamas: tuple[Path, dict[str, Any]],
) -> None:
    one, *others = [
        run_ranks(_full_gradients, world_size(layout), layout, llamas[0], torch.float64, recompute, *HEADS)
        for layout, recompute in ((LAYOUTS[0], "none"), (LAYOUTS[3], "selective"), (LAYOUTS[5], "full"))
    ]
    for name in HEADS:
        for other in others:
            found = _merge([rank[name] for rank in other])
            for key, grad in one[0][name].items():
                # float64 sums in another order, relative to the tensor's largest element
                torch.testing.assert_close(found[key], grad, atol=1e-12 * float(grad.abs().max()), rtol=0)
