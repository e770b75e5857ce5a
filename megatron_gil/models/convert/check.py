"""Whether the tensors of a directory are those of the model that its config.json describes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

from megatron_gil.config import ConfigError
from megatron_gil.models.convert.weight_files import WeightFile
from megatron_gil.models.families import Head, ModelSpec
from megatron_gil.models.weight_table import EMBEDDING, GROUP_HEAD, LM_HEAD, SCORE_BIAS, SCORE_HEAD, Shape

_BUFFER = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # written by early transformers 4


def expected_shapes(spec: ModelSpec, head: Head) -> Iterator[tuple[str, Shape]]:
    """Name and shape of every tensor such a model must have."""
    for _, tensor in spec.weights(head).hf_tensors(spec.num_layers):
        yield tensor.name, tensor.shape


def check_tensors(
    files: Sequence[WeightFile], spec: ModelSpec, head: Head, directory: Path, *, others: bool = False
) -> None:
    """ConfigError names the first tensor that is missing, of another shape, there twice, or not one of its family's.

    others: allow tensors that the model does not need, which training leaves alone; then only headers are read.
    """
    holders = _holders(files)
    if head != "lm" and SCORE_HEAD in holders:
        _check_score(holders, spec)
    known = set()
    for name, shape in expected_shapes(spec, head):
        if name not in holders:
            raise ConfigError(
                f"{directory}: no tensor {name} in its {len(files)} weight file(s), expected {list(shape)}"
            )
        _check_shape(holders[name], name, shape)
        known.add(name)
    if others:
        return
    if spec.tied and head == "lm":
        check_tied(files)
        known.add(LM_HEAD)
    if head != "lm" and GROUP_HEAD in holders:
        known.add(GROUP_HEAD)
    for name, file in holders.items():
        if name not in known and not _BUFFER.fullmatch(name):
            raise ConfigError(f"{file.path}: tensor {name} is not expected in a {spec.name} of this config.json")


def _holders(files: Sequence[WeightFile]) -> dict[str, WeightFile]:
    holders: dict[str, WeightFile] = {}
    for file in files:
        for name in file.tensors:
            if name in holders:
                raise ConfigError(f"{file.path}: tensor {name} is in {holders[name].path.name} too, expected in one")
            holders[name] = file
    return holders


def _check_shape(file: WeightFile, name: str, expected: Shape) -> None:
    found = file.tensors[name].shape
    if found != expected:
        raise ConfigError(
            f"{file.path}: tensor {name} has shape {list(found)}, expected {list(expected)} by config.json"
        )


def _check_score(holders: dict[str, WeightFile], spec: ModelSpec) -> None:
    """One number a row, without a bias, as transformers' class reads it."""
    shape = holders[SCORE_HEAD].tensors[SCORE_HEAD].shape
    if len(shape) == 2 and shape[0] != 1:
        raise ConfigError(
            f"{holders[SCORE_HEAD].path}: tensor {SCORE_HEAD} gives {shape[0]} labels, expected 1: a reward is one "
            "number; keep the row of the label that is the reward, and set num_labels to 1 in config.json"
        )
    if SCORE_BIAS in holders:
        raise ConfigError(
            f"{holders[SCORE_BIAS].path}: tensor {SCORE_BIAS} is not expected: transformers' "
            f"{spec.architectures()['score']} has none and drops it; it moves all scores alike, so that a copy of the "
            "model without it ranks the same"
        )


def check_tied(files: Sequence[WeightFile]) -> None:
    """A tied head written out is the embedding, or config.json is wrong about it: transformers 5 takes the head."""
    holders = _holders(files)
    if LM_HEAD not in holders:
        return
    embedding, lm_head = holders[EMBEDDING], holders[LM_HEAD]
    shape = embedding.tensors[EMBEDDING].shape
    _check_shape(lm_head, LM_HEAD, shape)
    same_dtype = embedding.tensors[EMBEDDING].dtype == lm_head.tensors[LM_HEAD].dtype
    pieces = zip_longest(embedding.chunks(EMBEDDING), lm_head.chunks(LM_HEAD))
    if not same_dtype or any(one != other for one, other in pieces):
        raise ConfigError(
            f"{lm_head.path}: tensor {LM_HEAD} is not the embedding, expected so by tie_word_embeddings=true in "
            "config.json; set it to false"
        )
