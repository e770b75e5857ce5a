"""`bench.py convert`: import and export against `cp -r`, interleaved, on a synthetic bfloat16 Llama in two shards."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

from megatron_gil.models.convert.check import expected_shapes
from megatron_gil.models.convert.weight_files import SafetensorsFile, StoredTensor
from megatron_gil.models.families import spec_from_config

TOOL = Path(__file__).with_name("convert_hf.py")
NUM_SHARDS = 2
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32000,
    "rope_theta": 10000.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}


@dataclass(frozen=True, slots=True)
class Action:
    name: str
    command: Sequence[str | Path]  # the target is put at its end
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)


def bench_convert(*, size: int, rounds: int, directory: Path | None) -> str:
    """The table. Every run starts with the source in the page cache and no earlier run's writes pending."""
    with tempfile.TemporaryDirectory(dir=directory, prefix="bench-convert-") as place:
        root = Path(place)
        largest = write_checkpoint(root / "hf", size)
        write_run(root / "hf", root / "run")
        convert: list[str | Path] = [sys.executable, TOOL]
        actions = [
            Action("cp -r", ["cp", "-r", root / "hf"]),
            Action("import", [*convert, "import", root / "hf"]),
            Action("export of a model directory", [*convert, "export", root / "hf"]),
            Action("export of a run, checksums included", [*convert, "export", root / "run"]),
        ]
        order = random.Random(1)
        for number in range(rounds + 1):
            for action in order.sample(actions, len(actions)):
                seconds, cpu_seconds, peak = measure([*action.command, root / "target"])
                shutil.rmtree(root / "target")
                if number:  # the first round fills the page cache
                    action.seconds.append(seconds)
                    action.cpu_seconds.append(cpu_seconds)
                    action.peak_bytes.append(peak)
        return format_table(actions, sum(p.stat().st_size for p in (root / "hf").iterdir()), largest)


def measure(command: Sequence[str | Path]) -> tuple[float, float, int]:
    """(seconds, seconds on a CPU, peak resident bytes) of one process. This one must stay small: a child starts with
    its parent's peak."""
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {process.returncode}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def format_table(actions: Sequence[Action], size: int, largest: int) -> str:
    copy = actions[0]
    limit = 1.3 * largest + 512 * 2**20
    lines = [
        f"{size / 2**30:.2f} GiB in {NUM_SHARDS} shards, the largest {largest / 2**30:.2f} GiB; {len(copy.seconds)} "
        f"interleaved rounds, median (min to max); {os.cpu_count()} CPUs. "
        f"Limits: 2 x cp, {limit / 2**20:.0f} MiB.",
        "",
        "| | seconds | times cp, of the same round | seconds on a CPU | peak memory, MiB |",
        "|---|---|---|---|---|",
    ]
    for action in actions:
        ratios = [mine / theirs for mine, theirs in zip(action.seconds, copy.seconds, strict=True)]
        peak = max(action.peak_bytes) / 2**20
        lines.append(
            f"| {action.name} | {_spread(action.seconds)} | {_spread(ratios)} | "
            f"{_spread(action.cpu_seconds)} | {peak:.0f} |"
        )
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def write_checkpoint(directory: Path, size: int) -> int:
    """A Hugging Face directory of about `size` bytes of arbitrary weights; the bytes of its largest shard."""
    directory.mkdir()
    config = {**CONFIG, "num_hidden_layers": _num_layers(size)}
    (directory / "config.json").write_text(json.dumps(config))
    words = {word: i for i, word in enumerate(("<s>", "</s>", "<unk>", "a"))}
    Tokenizer(models.WordLevel(words, unk_token="<unk>")).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    tensors = _tensors(config)
    share = -(-sum(t.num_bytes for t in tensors.values()) // NUM_SHARDS)
    shards: list[dict[str, StoredTensor]] = [{}]
    for name, tensor in tensors.items():
        shards[-1][name] = tensor
        if sum(t.num_bytes for t in shards[-1].values()) >= share:
            shards.append({})
    shards = [shard for shard in shards if shard]
    for i, shard in enumerate(shards, start=1):
        _write_shard(directory / f"model-{i:05}-of-{len(shards):05}.safetensors", shard)
    return max(path.stat().st_size for path in directory.glob("*.safetensors"))


def write_run(model: Path, run: Path) -> None:
    """A run directory whose one checkpoint is this model, as training writes it (the files are hard links)."""
    checkpoint = run / "checkpoints/iter_0000001"
    (checkpoint / "policy").mkdir(parents=True)
    manifest = {}
    for path in sorted(model.iterdir()):
        (checkpoint / "policy" / path.name).hardlink_to(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        manifest[f"policy/{path.name}"] = {"size": path.stat().st_size, "sha256": digest}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def _tensors(config: dict[str, Any]) -> dict[str, StoredTensor]:
    spec = spec_from_config(config, source="synthetic")
    return {name: StoredTensor("BF16", shape) for name, shape in expected_shapes(spec, "lm")}


def _num_layers(size: int) -> int:
    one, two = (sum(t.num_bytes for t in _tensors({**CONFIG, "num_hidden_layers": n}).values()) for n in (1, 2))
    return max(1, round((size - one) / (two - one)) + 1)


def _write_shard(path: Path, tensors: dict[str, StoredTensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.num_bytes
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for piece in _noise(end):
            file.write(piece)
    assert SafetensorsFile.read(path).tensors.keys() == tensors.keys()


def _noise(num_bytes: int) -> Iterator[bytes]:
    """bfloat16 numbers of magnitude below 2, as weights are: the top bit of the exponent is 0."""
    block = bytearray(os.urandom(1 << 20))
    block[1::2] = bytes(byte & 0b10111111 for byte in block[1::2])
    for start in range(0, num_bytes, len(block)):
        yield bytes(block[: min(len(block), num_bytes - start)])
