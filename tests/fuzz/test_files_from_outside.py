"""Damaged and invented files of every kind that is read: accepted, or refused in one line; nothing else ever happens.

`make fuzz` draws 1,500 inputs for each of the readers, `make test` 100.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from megatron_gil.config import ConfigError, PpoConfig
from megatron_gil.config.files import load_config
from megatron_gil.config.ranges import RANGE
from megatron_gil.data.rows.fields import check_record
from megatron_gil.data.rows.records import iter_parquet
from megatron_gil.data.text.special_tokens import JSON_FILES
from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.engine.files import read_manifest
from megatron_gil.evaluation.comparisons import read_responses
from megatron_gil.evaluation.report.runs import read_run
from megatron_gil.jsonl import iter_jsonl
from megatron_gil.models.families import read_spec
from megatron_gil.models.hf_files import HfTensors
from tests.models.tiny import FAMILIES, WINDOW

KINDS = ("prompts", "demonstrations", "responses", "preferences", "texts")
_CHECKS = [
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.filter_too_much,
    HealthCheck.large_base_example,
]
fuzzed = settings(deadline=10_000, suppress_health_check=_CHECKS)
"""10 s for one input is a hang."""

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """The bytes with up to eight places overwritten, cut out, doubled or filled in; or cut short."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 8))):
        start = draw(st.integers(0, max(0, len(content) - 1)) | st.integers(0, min(200, max(0, len(content) - 1))))
        length = draw(st.integers(1, 16))
        act = draw(st.sampled_from(("write", "insert", "delete", "double", "cut")))
        if act == "write":
            content[start : start + length] = draw(st.binary(min_size=length, max_size=length))
        elif act == "insert":
            content[start:start] = draw(st.binary(min_size=1, max_size=16))
        elif act == "delete":
            del content[start : start + length]
        elif act == "double":
            content[start:start] = content[start : start + length]
        else:
            del content[start:]
    return bytes(content)


def _accept_or_refuse(read: Callable[[], Any], directory: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    said = "accepted"
    try:
        read()
    except ConfigError as error:
        said = str(error)
    assert len(said.splitlines()) == 1
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before, "a reader wrote something"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory for all inputs, overwritten each time."""
    return tmp_path_factory.mktemp("fuzz")


CONFIG = b"run: {dir: x, seed: 3}\nbatch: {micro_size: 2}\n"


@fuzzed
@given(content=damaged(CONFIG) | st.binary(max_size=200) | json_values.map(lambda v: json.dumps(v).encode()))
def test_config_files(content: bytes, place: Path) -> None:
    path = place / "run.yaml"
    path.write_bytes(content)
    _accept_or_refuse(lambda: load_config(PpoConfig, path, []), place)


NUMBERS = [
    f"{section.name}.{f.name}"
    for section in fields(PpoConfig)
    for f in fields(section.default_factory)  # type: ignore[arg-type]
    if RANGE in f.metadata
]
hard_numbers = st.sampled_from(["nan", "inf", "-inf", "-1", "0", "1e308", "1e999", "1" + "0" * 400, "0x" + "f" * 5000])


@fuzzed
@given(
    key=st.sampled_from([*NUMBERS, "run.dir", "batch", "", "x.y", "models.dtype"]) | st.text(max_size=12),
    value=st.text(max_size=30) | json_values.map(json.dumps) | hard_numbers,
)
def test_overrides(key: str, value: str, place: Path) -> None:
    _accept_or_refuse(lambda: load_config(PpoConfig, None, ["run.dir=x", f"{key}={value}"]), place)


ROW = {"prompt": "Hello", "completion": " you", "chosen": " a", "rejected": " b", "text": "t", "group": "g"}
FIELDS = st.sampled_from([*ROW, "messages", "role", "content", "response"])
rows = st.dictionaries(FIELDS, json_values | st.lists(st.dictionaries(FIELDS, json_values, max_size=3), max_size=3))


def _read_rows(path: Path, iterate: Any) -> None:
    for kind in KINDS:
        for number, record in iterate(path):
            check_record(record, kind, f"{path}:{number}")


@fuzzed
@given(
    content=damaged((json.dumps(ROW) + "\n").encode() * 3)
    | st.binary(max_size=200)
    | st.lists(rows | json_values, max_size=4).map(lambda found: "\n".join(map(json.dumps, found)).encode())
)
def test_json_lines(content: bytes, place: Path) -> None:
    path = place / "rows.jsonl"
    path.write_bytes(content)
    _accept_or_refuse(lambda: _read_rows(path, iter_jsonl), place)


def _parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([{**ROW, "messages": [{"role": "user", "content": "x"}]}] * 3), sink)
    return sink.getvalue().to_pybytes()


@fuzzed
@given(content=damaged(_parquet()) | st.binary(max_size=200))
def test_parquet(content: bytes, place: Path) -> None:
    path = place / "rows.parquet"
    path.write_bytes(content)
    _accept_or_refuse(lambda: _read_rows(path, iter_parquet), place)


@pytest.fixture(scope="module")
def weights(place: Path) -> bytes:
    save_file({"a": torch.ones(3, 4), "b.weight": torch.zeros(5)}, place / "whole")
    content = (place / "whole").read_bytes()
    (place / "whole").unlink()
    return content


@st.composite
def header_entries(draw: st.DrawFn, whole: bytes) -> bytes:
    """Well-formed JSON with a wrong dtype, shape or offset."""
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    name = draw(st.sampled_from(sorted(header)))
    dtypes = st.sampled_from(["F64", "F8_E4M3", "I32", "BOOL", "BF16", "F16", "F4", "C64"])
    value = draw(dtypes | st.lists(st.integers(0, 2**64), max_size=3) | json_values)
    header[name] = {**header[name], draw(st.sampled_from(["dtype", "shape", "data_offsets"])): value}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + whole[end:]


ROPE = ["rope_type", "rope_theta", "factor", "low_freq_factor", "original_max_position_embeddings"]


def _read_tensors(directory: Path) -> None:
    tensors = HfTensors.open(directory)
    for name in tensors.files:
        tensors.read(name, tuple(slice(0, 1) for _ in tensors.shape(name)))


@fuzzed
@given(data=st.data())
def test_safetensors(data: st.DataObject, weights: bytes, place: Path) -> None:
    header = json_values.map(lambda v: json.dumps(v).encode()).map(
        lambda h: len(h).to_bytes(8, "little") + h + b"0" * 64
    )
    content = data.draw(damaged(weights) | header | header_entries(weights) | st.binary(max_size=80))
    (place / "model.safetensors").write_bytes(content)
    _accept_or_refuse(lambda: _read_tensors(place), place)


@fuzzed
@given(
    content=st.binary(max_size=100) | st.fixed_dictionaries({"weight_map": json_values}).map(json.dumps).map(str.encode)
)
def test_weight_index(content: bytes, weights: bytes, place: Path) -> None:
    (place / "model.safetensors").write_bytes(weights)
    index = place / "model.safetensors.index.json"
    index.write_bytes(content)
    try:
        _accept_or_refuse(lambda: _read_tensors(place), place)
    finally:
        index.unlink()


@fuzzed
@given(data=st.data())
def test_config_json(data: st.DataObject, world: Path, place: Path) -> None:
    name = data.draw(st.sampled_from(["policy", *FAMILIES]))
    whole = json.loads((world / name / "config.json").read_text())
    keys = sorted(
        {*whole, "rope_scaling", "rope_theta", "rms_norm_eps", "id2label", "torch_dtype", "layer_types", *WINDOW}
    )
    rope = st.dictionaries(st.sampled_from(ROPE), json_values, max_size=5)
    changes = st.dictionaries(st.sampled_from(keys), json_values | rope, min_size=1, max_size=3)
    changed = changes.map(lambda found: json.dumps({**whole, **found}).encode())
    (place / "config.json").write_bytes(data.draw(changed | damaged(json.dumps(whole).encode())))
    _accept_or_refuse(lambda: read_spec(place), place)


@fuzzed
@given(data=st.data())
def test_sentencepiece(data: st.DataObject, world: Path, place: Path) -> None:
    (place / "tokenizer.model").write_bytes(data.draw(damaged((world / "tokenizer.model").read_bytes())))
    _accept_or_refuse(lambda: Tokenizer.read(place).encode("sun moon"), place)


BESIDE_THE_VOCABULARY = ["tokenizer.json", *JSON_FILES]
SAID_THERE = [
    *("bos_token", "pad_token", "additional_special_tokens", "added_tokens_decoder", "add_bos_token", "chat_template"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size", "added_tokens", "model"),
]
tokens_by_id = st.dictionaries(st.integers(-1, 600).map(str) | st.text(max_size=3), json_values, max_size=2)


@fuzzed
@given(
    name=st.sampled_from(BESIDE_THE_VOCABULARY),
    content=json_values | st.dictionaries(st.sampled_from(SAID_THERE), json_values | tokens_by_id, max_size=3),
)
def test_tokenizer_files(name: str, content: Any, world: Path, place: Path) -> None:
    (place / "tokenizer.model").write_bytes((world / "tokenizer.model").read_bytes())
    (place / name).write_text(json.dumps(content))
    try:
        _accept_or_refuse(lambda: Tokenizer.read(place).encode("sun moon"), place)
    finally:
        (place / name).unlink()


@fuzzed
@given(content=st.binary(max_size=100) | json_values.map(lambda value: json.dumps(value).encode()))
def test_manifest(content: bytes, place: Path) -> None:
    (place / "manifest.json").write_bytes(content)
    _accept_or_refuse(lambda: read_manifest(place), place)


METRICS = b'{"iteration": 0, "a": 1.5}\n{"iteration": 1, "a": null}\n'
SAMPLE = {"iteration": 1, "prompt": "p", "response": "r", "score": 1.0, "group_probs": [0.5, 0.5]}
odd_rows = st.dictionaries(st.sampled_from([*SAMPLE, "key", "a"]), json_values).map(lambda row: {**SAMPLE, **row})


@fuzzed
@given(
    name=st.sampled_from(["config.yaml", "metrics.jsonl", "samples.jsonl", "config_history.jsonl"]),
    content=damaged(METRICS)
    | damaged(CONFIG)
    | st.binary(max_size=80)
    | st.lists(odd_rows | json_values, max_size=3).map(lambda found: "\n".join(map(json.dumps, found)).encode()),
)
def test_run_directories(name: str, content: bytes, place: Path) -> None:
    (place / "metrics.jsonl").write_bytes(METRICS)
    (place / name).write_bytes(content)
    try:
        _accept_or_refuse(lambda: read_run(place), place)
    finally:
        (place / name).unlink()


@fuzzed
@given(
    content=st.binary(max_size=80)
    | st.lists(odd_rows | json_values, max_size=3).map(lambda found: "\n".join(map(json.dumps, found)).encode())
)
def test_responses(content: bytes, place: Path) -> None:
    (place / "responses.jsonl").write_bytes(content)
    _accept_or_refuse(lambda: read_responses(place / "responses.jsonl"), place)
