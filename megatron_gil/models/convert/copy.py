"""A checked copy of a model directory: headers, names and sizes are verified before a byte is written, checksums while
it is; written beside first."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from megatron_gil.config import ConfigError
from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.models.convert.bin_files import read_bin_files
from megatron_gil.models.convert.check import check_tensors
from megatron_gil.models.convert.config_json import (
    CARD_FILE,
    portable_config,
    read_tokenizer,
    score_config,
    write_small_files,
)
from megatron_gil.models.convert.lineage import trace
from megatron_gil.models.convert.locate import Digests, Role, check_digest, use_model
from megatron_gil.models.convert.model_card import model_card
from megatron_gil.models.convert.weight_files import (
    DTYPES,
    SafetensorsFile,
    StoredTensor,
    WeightFile,
    read_safetensors,
    safetensors_header,
)
from megatron_gil.models.families import Head, ModelSpec, read_config, spec_from_config
from megatron_gil.models.weight_table import GROUP_HEAD

COPIED_BYTES = 1 << 18
"""Read, digested and written at a time: fits the cache of a core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDirectory:
    path: Path
    config: dict[str, Any]
    spec: ModelSpec
    head: Head
    files: Sequence[WeightFile]

    @classmethod
    def read(cls, path: Path, *, allow_bin: bool = False, role: Role | None = None) -> ModelDirectory:
        """Sizes, headers and names, all checked; ConfigError in one line."""
        config = read_config(path)
        spec = spec_from_config(config, source=str(path / "config.json"))
        head = _head(config, spec, path, role)
        has_bin_only = not any(path.glob("model*.safetensors*")) and any(path.glob("pytorch_model*.bin"))
        files = read_bin_files(path) if allow_bin and has_bin_only else read_safetensors(path)
        check_tensors(files, spec, head, path)
        return cls(path=path, config=config, spec=spec, head=head, files=files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a conversion wrote."""

    path: Path
    num_tensors: int
    num_files: int
    num_bytes: int


def import_model(hf_dir: Path, ckpt_dir: Path, *, allow_bin: bool = False, dtype: str | None = None) -> Written:
    """A Hugging Face directory as one that training loads at any layout. dtype: None keeps every bit."""
    return _write(ModelDirectory.read(hf_dir, allow_bin=allow_bin), ckpt_dir, dtype, digests={})


def export_model(
    ckpt_dir: Path,
    hf_dir: Path,
    *,
    role: Role | None = None,
    dtype: str | None = None,
    note: Callable[[str], None],
) -> Written:
    """One model of an imported directory, checkpoint or run as a directory that transformers and vLLM load. The
    critic goes without its group classifier, which no other program reads. A README.md that lies beside the weights
    goes along; where there is none, a model card is written."""
    _check_new(hf_dir)

    def export(path: Path, digests: Digests) -> Written:
        source = ModelDirectory.read(path, role=role)
        return _write(source, hf_dir, dtype, digests, card=lambda tokenizer: _card(source, tokenizer, note))

    return use_model(ckpt_dir, role, note, export)


def _card(source: ModelDirectory, tokenizer: Tokenizer, note: Callable[[str], None]) -> str:
    tensors = {name: tensor for file in source.files for name, tensor in _kept(file, None).items()}
    return model_card(
        trace(source.path, note),
        role=source.path.resolve().name,
        head=source.head,
        family=str(source.config["model_type"]),
        tokenizer=tokenizer,
        num_parameters=sum(math.prod(tensor.shape) for tensor in tensors.values()),
    )


def _head(config: dict[str, Any], spec: ModelSpec, path: Path, role: Role | None) -> Head:
    is_score = config.get("architectures") == [spec.architectures()["score"]]
    if role is not None and is_score != (role != "policy"):
        found = "a score head" if is_score else "a language-model head"
        raise ConfigError(f"{path / 'config.json'}: architectures names a model with {found}, not a {role}")
    return "score" if is_score else "lm"


def _check_new(target: Path) -> None:
    if target.exists():
        raise ConfigError(f"{target} exists already; nothing is overwritten, choose another name")


def _write(
    source: ModelDirectory,
    target: Path,
    dtype: str | None,
    digests: Digests,
    *,
    card: Callable[[Tokenizer], str] | None = None,
) -> Written:
    """Write beside, then rename: `target` is there whole or not at all. What a killed run left is removed first.

    card: makes the README.md of a source that has none.
    Damaged where a weight file turns out not to have the digest that is expected of it.
    """
    _check_new(target)
    cast = None if dtype is None else DTYPES[dtype]
    tokenizer = read_tokenizer(source.path)
    config = portable_config(source.config, source.spec, source.head, cast)
    if source.head != "lm":
        config = score_config(config, source.spec, tokenizer, source.path)
    plan = [(file, tensors) for file in source.files if (tensors := _kept(file, cast))]
    num_bytes = sum(tensor.num_bytes for _, tensors in plan for tensor in tensors.values())
    target.parent.mkdir(parents=True, exist_ok=True)
    _check_space(target.parent, num_bytes)
    beside = target.parent / f".{target.name}.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        write_small_files(config, source.head, tokenizer, source.path, beside)
        if card is not None and not (beside / CARD_FILE).exists():
            (beside / CARD_FILE).write_text(card(tokenizer), encoding="utf-8")
        _write_weights(plan, beside, num_bytes, digests)
        beside.rename(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    num_tensors = sum(len(tensors) for _, tensors in plan)
    return Written(path=target, num_tensors=num_tensors, num_files=len(plan), num_bytes=num_bytes)


def _kept(file: WeightFile, cast: str | None) -> dict[str, StoredTensor]:
    return {
        name: tensor if cast in (None, tensor.dtype) else StoredTensor(cast, tensor.shape)
        for name, tensor in file.tensors.items()
        if name != GROUP_HEAD
    }


def _check_space(directory: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise ConfigError(
            f"{directory}: {num_bytes / 2**30:.1f} GiB are to be written, {free / 2**30:.1f} GiB are free"
        )


Plan = Sequence[tuple[WeightFile, dict[str, StoredTensor]]]
"""Each file that is written: the file that it comes from, and what it will hold."""


def _write_weights(plan: Plan, directory: Path, num_bytes: int, digests: Digests) -> None:
    """The files under Hugging Face's names, as many as there were, and their index if there are several. Where digests
    are expected, several files are read at a time: a digest takes a CPU longer than a copy does."""
    names = [f"model-{i:05}-of-{len(plan):05}.safetensors" for i in range(1, len(plan) + 1)]
    if len(plan) == 1:
        names = ["model.safetensors"]
    as_they_were = {
        file.path: directory / name
        for name, (file, tensors) in zip(names, plan, strict=True)
        if isinstance(file, SafetensorsFile) and file.tensors == tensors and "format" in file.metadata
    }
    stopped = Event()
    with ThreadPoolExecutor() as threads:
        try:
            proofs = [
                threads.submit(_copy_proven, file, as_they_were.get(file, Path(os.devnull)), digest, stopped)
                for file, digest in digests.items()
            ]
            for name, (file, tensors) in zip(names, plan, strict=True):
                if file.path not in as_they_were:
                    _write_file(file, tensors, directory / name)
                elif file.path not in digests:
                    shutil.copyfile(file.path, directory / name)
            for proof in as_completed(proofs):
                proof.result()
        except BaseException:  # a Ctrl-C too, which does not wait for the threads to end their files
            stopped.set()
            threads.shutdown(cancel_futures=True)
            raise
    weight_map = {tensor: name for name, (_, tensors) in zip(names, plan, strict=True) for tensor in tensors}
    if len(plan) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        path = directory / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _copy_proven(source: Path, target: Path, expected: str, stopped: Event) -> None:
    """Copy through a small buffer that is digested before it is written, so that the file is read once. Damaged where
    the digest is another. stopped: set to end before the file does."""
    sha256, buffer = hashlib.sha256(), memoryview(bytearray(COPIED_BYTES))
    with source.open("rb", buffering=0) as read, target.open("wb", buffering=0) as written:
        while (size := read.readinto(buffer)) and not stopped.is_set():
            sha256.update(buffer[:size])
            rest = buffer[:size]
            while rest:
                rest = rest[written.write(rest) :]
    if not stopped.is_set():
        check_digest(source, sha256.hexdigest(), expected)


def _write_file(file: WeightFile, tensors: dict[str, StoredTensor], path: Path) -> None:
    """A safetensors file of these tensors of `file`, in pieces; no tensor is ever whole in memory."""
    with path.open("wb") as out:
        out.write(safetensors_header(tensors))
        for name, tensor in tensors.items():
            for chunk in _cast(file, name, tensor.dtype):
                out.write(chunk)


def _cast(file: WeightFile, name: str, dtype: str) -> Iterator[Any]:
    """The tensor's bytes in another dtype; ConfigError where a finite number has no finite counterpart in it."""
    stored = file.tensors[name].dtype
    if stored == dtype:
        yield from file.chunks(name)
        return
    import torch

    names = {short: getattr(torch, long) for long, short in DTYPES.items()}
    for chunk in file.chunks(name):
        before = torch.frombuffer(bytearray(chunk), dtype=names[stored])
        after = before.to(names[dtype])
        if not after.abs().amax().isfinite() and not torch.equal(before.isfinite(), after.isfinite()):
            raise ConfigError(
                f"{file.path}: tensor {name} holds numbers too large for {dtype}; take bfloat16 or float32"
            )
        yield after.view(torch.uint8).numpy().data
