"""Whatever stands in the files: a ConfigError of one line or a success, never anything else."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_gil.config import ConfigError
from megatron_gil.models.convert.copy import import_model
from tests.convert.directories import files_under

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("default"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
quick = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _import_changed(source: Path, name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        shutil.copytree(source, root / "source")
        (root / "source" / name).write_bytes(content)
        message = None
        try:
            import_model(root / "source", root / "imported")
        except ConfigError as error:
            message = str(error)
        assert "\n" not in (message or "")
        assert files_under(root) == (["imported", "source"] if message is None else ["source"])


@quick
@given(data=st.data())
def test_config_values(world: Path, data: Any) -> None:
    config = json.loads((world / "tied/config.json").read_text())
    keys = [*config, "rope_scaling", "rope_theta", "rms_norm_eps", "id2label", "torch_dtype"]
    rope_keys = ["rope_type", "rope_theta", "factor", "low_freq_factor", "original_max_position_embeddings"]
    for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3)):
        config[key] = data.draw(json_values | st.dictionaries(st.sampled_from(rope_keys), json_values, max_size=5))
    _import_changed(world / "tied", "config.json", json.dumps(config).encode())


@quick
@given(content=st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode()))
def test_config_texts(world: Path, content: bytes) -> None:
    _import_changed(world / "tied", "config.json", content)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"hidden_size": ' + "9" * 5000 + "}", "\ufeff{}"])
def test_config_texts_that_break_parsers(world: Path, text: str) -> None:
    _import_changed(world / "tied", "config.json", text.encode())


@quick
@given(content=json_values.map(lambda value: json.dumps({"weight_map": value}).encode()) | st.binary(max_size=40))
def test_indices(world: Path, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "source"
        shutil.copytree(world / "tied", source)
        (source / "model.safetensors").unlink()
        _import_changed(source, "model.safetensors.index.json", content)


@quick
@given(data=st.data())
def test_header_bytes(world: Path, data: Any) -> None:
    content = bytearray((world / "tied/model.safetensors").read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, end - 1) | st.integers(0, 9))
        content[position] = data.draw(st.integers(0, 255) | st.sampled_from(b'0123456789"{}[],:'))
    del content[data.draw(st.integers(0, len(content)) | st.just(len(content))) :]
    _import_changed(world / "tied", "model.safetensors", bytes(content))


@quick
@given(data=st.data())
def test_header_entries(world: Path, data: Any) -> None:
    """Well-formed JSON of wrong dtypes, shapes and offsets."""
    content = (world / "tied/model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    name = data.draw(st.sampled_from(list(header)))
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    dtypes = st.sampled_from(["F64", "F8_E4M3", "I32", "BOOL", "BF16", "F16", "F4", "C64"])
    numbers = st.lists(st.integers(0, 2**64), max_size=3)
    header[name] = {**header[name], field: data.draw(dtypes | numbers | json_values)}
    text = json.dumps(header).encode()
    _import_changed(world / "tied", "model.safetensors", len(text).to_bytes(8, "little") + text + content[end:])
