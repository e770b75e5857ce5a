"""What a Llama is: the sizes of config.json, checked, and the layouts that can hold it. Does not import torch, so that
a directory is read and checked at once."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from megatron_gil.config import ConfigError
from megatron_gil.models.llama.tensors import llama_weights
from megatron_gil.models.weight_table import WeightTable

if TYPE_CHECKING:
    import torch

Head = Literal["lm", "score", "critic"]
TokenIds = int | tuple[int, ...] | None

MOST = {
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 30,
}
"""Limits far above any Llama: a larger size is a mistake, and reading such a model would take hours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's stretching of RoPE's long wavelengths."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaSpec:
    architectures: ClassVar[dict[Head, str]] = {
        "lm": "LlamaForCausalLM",
        "score": "LlamaForSequenceClassification",
        "critic": "LlamaForSequenceClassification",
    }
    """transformers' classes."""
    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    tied: bool
    """The language-model head is the input embedding."""
    bos_token_id: TokenIds
    eos_token_id: TokenIds
    pad_token_id: TokenIds

    @classmethod
    def read(cls, hf_dir: Path) -> Self:
        """From config.json as transformers 4 or 5 writes it; ConfigError for anything but a plain Llama."""
        return cls.from_config(read_config(hf_dir), source=str(Path(hf_dir) / "config.json"))

    @classmethod
    def from_config(cls, raw: Any, source: str) -> Self:
        reader = _ConfigReader(raw, source)
        reader.check_plain_llama()
        num_heads = reader.size("num_attention_heads")
        hidden_size = reader.size("hidden_size")
        num_kv_heads = reader.size("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise ConfigError(
                f"{source}: num_attention_heads={num_heads} cannot be divided by num_key_value_heads={num_kv_heads}"
            )
        head_dim = reader.size("head_dim", hidden_size // num_heads)
        if head_dim % 2:
            raise ConfigError(f"{source}: head_dim is {head_dim}, expected an even number: RoPE turns pairs")
        theta, scaling = reader.rope()
        return cls(
            hidden_size=hidden_size,
            ffn_size=reader.size("intermediate_size"),
            num_layers=reader.size("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            vocab_size=reader.size("vocab_size"),
            max_positions=reader.size("max_position_embeddings", 2048),
            norm_eps=reader.number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tied=reader.flag("tie_word_embeddings"),
            bos_token_id=reader.token_ids("bos_token_id"),
            eos_token_id=reader.token_ids("eos_token_id"),
            pad_token_id=reader.token_ids("pad_token_id"),
        )

    def layers_of(self, pp_rank: int, pp_size: int) -> range:
        """The layers of one pipeline rank; where they do not divide, the first ranks have one more than the last."""
        share, rest = divmod(self.num_layers, pp_size)
        first = pp_rank * share + min(pp_rank, rest)
        return range(first, first + share + (pp_rank < rest))

    def padded_vocab_size(self, tp_size: int) -> int:
        """Rows of the embedding so that every tensor-parallel rank holds as many; never seen outside the model."""
        return math.ceil(self.vocab_size / tp_size) * tp_size

    def weights(self, head: Head, num_groups: int = 0) -> WeightTable:
        """The model's tensors: names, shapes and how ranks share them; group logits with more than one group."""
        return llama_weights(self, head, num_groups)

    def hf_config(self, *, head: Head, num_groups: int = 0, dtype: torch.dtype) -> dict[str, Any]:
        """config.json for these sizes, in the keys that both transformers 4 and 5 read."""
        config: dict[str, Any] = {
            "architectures": [self.architectures[head]],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling_config(),
            "tie_word_embeddings": self.tied,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            "torch_dtype": str(dtype).removeprefix("torch."),
        }
        if head != "lm":
            config["num_labels"] = 1
            config["id2label"] = {"0": "LABEL_0"}
            config["label2id"] = {"LABEL_0": 0}
        if num_groups > 1:
            config["num_groups"] = num_groups
        return config

    def rope_scaling_config(self) -> dict[str, Any] | None:
        """RoPE's scaling, theta not included, as config.json spells it."""
        if self.rope_scaling is None:
            return None
        return {
            "rope_type": "llama3",
            "factor": self.rope_scaling.factor,
            "low_freq_factor": self.rope_scaling.low_freq_factor,
            "high_freq_factor": self.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": self.rope_scaling.original_max_positions,
        }


def read_config(hf_dir: Path) -> Any:
    """What config.json holds, not yet checked."""
    path = Path(hf_dir) / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None


def check_layout(spec: LlamaSpec, tp_size: int, pp_size: int, sequence_parallel: bool) -> None:
    """ConfigError where the model cannot be cut so; the vocabulary always can (it is padded)."""
    parts = (
        ("num_attention_heads", spec.num_heads),
        ("num_key_value_heads", spec.num_kv_heads),
        ("intermediate_size", spec.ffn_size),
    )
    for key, size in parts:
        if size % tp_size:
            fits = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
            raise ConfigError(
                f"the model's {key}={size} cannot be divided by parallel.tensor_size={tp_size}; set it to one of {fits}"
            )
    if pp_size > spec.num_layers:
        raise ConfigError(
            f"the model's num_hidden_layers={spec.num_layers} cannot be cut into parallel.pipeline_size={pp_size}; set "
            f"it to at most {spec.num_layers}"
        )
    if sequence_parallel and tp_size == 1:
        raise ConfigError("parallel.sequence_parallel=true needs parallel.tensor_size above 1; set one of the two")
    if (tp_size - 1) * (spec.padded_vocab_size(tp_size) // tp_size) >= spec.vocab_size:
        raise ConfigError(
            f"the model's vocab_size={spec.vocab_size} leaves a rank of parallel.tensor_size={tp_size} empty; lower it"
        )


@dataclass(frozen=True, slots=True)
class _ConfigReader:
    raw: Any
    source: str

    def check_plain_llama(self) -> None:
        if not isinstance(self.raw, dict):
            raise ConfigError(f"{self.source}: must hold a JSON object, found {type(self.raw).__name__}")
        for key, expected, default in (
            ("model_type", "llama", None),
            ("hidden_act", "silu", "silu"),
            ("attention_bias", False, False),
            ("mlp_bias", False, False),
        ):
            found = self.raw.get(key, default)
            if found != expected:
                raise ConfigError(f"{self.source}: {key} is {found!r}, expected {expected!r}: only Llama is supported")
        architectures = self.raw.get("architectures") or []
        if not isinstance(architectures, list):
            raise ConfigError(f"{self.source}: architectures is {architectures!r}, expected a list of names")
        known_names = sorted(set(LlamaSpec.architectures.values()))
        for architecture in architectures:
            if architecture not in (*known_names, "LlamaModel"):
                known = " or ".join(known_names)
                raise ConfigError(f"{self.source}: architectures is {architecture!r}, expected {known}")

    def size(self, key: str, default: int | None = None) -> int:
        found = self.raw.get(key)
        if found is None:
            found = default
        if not isinstance(found, int) or isinstance(found, bool) or not 0 < found <= MOST[key]:
            raise ConfigError(f"{self.source}: {key} is {found!r}, expected a whole number from 1 to {MOST[key]}")
        return found

    def number(self, key: str, default: float | None = None, table: dict[str, Any] | None = None) -> float:
        found = (self.raw if table is None else table).get(key)
        if found is None:
            found = default
        if not isinstance(found, int | float) or isinstance(found, bool) or not 0 < found < 2**63:
            raise ConfigError(f"{self.source}: {key} is {found!r}, expected a number above 0")
        return float(found)

    def flag(self, key: str) -> bool:
        found = self.raw.get(key)
        if found is not None and not isinstance(found, bool):
            raise ConfigError(f"{self.source}: {key} is {found!r}, expected true or false")
        return bool(found)

    def token_ids(self, key: str) -> TokenIds:
        found = self.raw.get(key)
        if isinstance(found, list) and all(isinstance(i, int) for i in found):
            return tuple(found)
        if found is not None and not isinstance(found, int):
            raise ConfigError(f"{self.source}: {key} is {found!r}, expected a token id, a list of them or null")
        return found

    def rope(self) -> tuple[float, Llama3Scaling | None]:
        """transformers 5: all in rope_parameters; transformers 4: rope_theta and rope_scaling."""
        table = self.raw.get("rope_scaling") or self.raw.get("rope_parameters") or {}  # transformers' own order
        if not isinstance(table, dict):
            raise ConfigError(f"{self.source}: rope_parameters is {table!r}, expected a JSON object")
        theta = self.number("rope_theta", self.number("rope_theta", 10000.0), table)
        kind = table.get("rope_type", table.get("type", "default"))
        if kind == "default":
            return theta, None
        if kind != "llama3":
            raise ConfigError(f"{self.source}: rope_type is {kind!r}, expected 'default' or 'llama3'")
        return theta, Llama3Scaling(
            factor=self.number("factor", table=table),
            low_freq_factor=self.number("low_freq_factor", table=table),
            high_freq_factor=self.number("high_freq_factor", table=table),
            original_max_positions=int(self.number("original_max_position_embeddings", table=table)),
        )
