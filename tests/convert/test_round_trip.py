"""Import and export keep every bit, whatever the files; and transformers loads what comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.models.convert.copy import export_model, import_model
from megatron_gil.models.families import read_spec, spec_from_config
from megatron_gil.models.rope import rope_frequencies
from tests.convert.directories import assert_equal_bits, copy_as, edit_config, files_under, read_tensors, write_tensors
from tests.models.tiny import FAMILIES, LLAMA3_ROPE
from tests.tokenizer_kinds import write_qwen_tokenizer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS: dict[str, Any] = {
    "policy": LlamaForCausalLM,
    "tied": LlamaForCausalLM,
    "reward_model": LlamaForSequenceClassification,
    **dict.fromkeys(FAMILIES, AutoModelForCausalLM),
    **{f"{name}_reward": AutoModelForSequenceClassification for name in FAMILIES},
}
CASES = [
    (name, dtype, form)
    for name in KINDS
    for dtype in DTYPES
    for form in ("single", "index", "shards")
    if KINDS[name] in (LlamaForCausalLM, LlamaForSequenceClassification) or (dtype, form) == (torch.bfloat16, "index")
]


@pytest.mark.parametrize(("name", "dtype", "form"), CASES, ids=str)
def test_every_bit_comes_back(world: Path, tmp_path: Path, name: str, dtype: torch.dtype, form: Any) -> None:
    source = copy_as(world / name, tmp_path / "source", dtype=dtype, form=form)
    import_model(source, tmp_path / "imported")
    export_model(tmp_path / "imported", tmp_path / "exported", role=None, note=pytest.fail)
    expected = read_tensors(source)
    assert_equal_bits(read_tensors(tmp_path / "imported"), expected)
    assert_equal_bits(read_tensors(tmp_path / "exported"), expected)
    assert files_under(tmp_path) == ["exported", "imported", "source"]
    model, report = KINDS[name].from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == dtype
    assert_equal_bits({k: v for k, v in model.state_dict().items() if k in expected}, expected)


def test_a_dtype_is_changed_as_torch_changes_it(world: Path, tmp_path: Path) -> None:
    for dtype in ("bfloat16", "float16", "float32"):
        written = import_model(world / "policy", tmp_path / dtype, dtype=dtype)
        expected = {name: t.to(getattr(torch, dtype)) for name, t in read_tensors(world / "policy").items()}
        assert_equal_bits(read_tensors(tmp_path / dtype), expected)
        assert written.num_bytes == sum(t.nbytes for t in expected.values())
        assert LlamaForCausalLM.from_pretrained(tmp_path / dtype).dtype == getattr(torch, dtype)


def test_a_file_without_metadata_gets_what_transformers_asks_for(world: Path, tmp_path: Path) -> None:
    source = copy_as(world / "policy", tmp_path / "source")
    tensors = read_tensors(source)
    save_file(tensors, source / "model.safetensors")
    import_model(source, tmp_path / "imported")
    assert_equal_bits(read_tensors(tmp_path / "imported"), tensors)
    header = (tmp_path / "imported/model.safetensors").read_bytes()[8:80]
    assert b'{"__metadata__": {"format": "pt"}' in header


def test_a_tied_head_that_is_written_out_is_taken(world: Path, tmp_path: Path) -> None:
    source = copy_as(world / "tied", tmp_path / "source")
    tensors = read_tensors(source)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_tensors(source, tensors)
    import_model(source, tmp_path / "imported")
    assert_equal_bits(read_tensors(tmp_path / "imported"), tensors)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 500.0, "rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}},
        {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500.0}},
        {"rope_theta": 500.0, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ],
    ids=["llama3-v4", "llama3-v5", "default-v4", "default-v5"],
)
def test_rope_is_written_for_both_generations(world: Path, tmp_path: Path, spelling: dict[str, Any]) -> None:
    source = copy_as(world / "policy", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    del config["rope_parameters"]
    (source / "config.json").write_text(json.dumps({**config, **spelling, "auto_map": {"AutoModel": "x.Y"}}))
    import_model(source, tmp_path / "imported")
    written = json.loads((tmp_path / "imported/config.json").read_text())
    assert "auto_map" not in written
    spec = read_spec(source)
    for keys in (("rope_theta", "rope_scaling"), ("rope_parameters",)):  # each generation finds all it needs in its own
        others = {"rope_theta", "rope_scaling", "rope_parameters"} - set(keys)
        alone = {key: value for key, value in written.items() if key not in others}
        assert spec_from_config(alone, "alone") == spec
        theirs = LlamaRotaryEmbedding(LlamaConfig.from_dict(alone)).inv_freq
        assert torch.equal(rope_frequencies(spec, torch.device("cpu")), theirs)


def test_the_tokenizer_comes_along(world: Path, tmp_path: Path) -> None:
    import_model(world / "policy", tmp_path / "imported")
    ours, theirs = Tokenizer.read(world / "policy"), AutoTokenizer.from_pretrained(tmp_path / "imported")
    text = "the sun  on stone\n and é"
    assert theirs(text)["input_ids"] == ours.encode(text, bos=True)
    for name in ("tokenizer.model", "special_tokens_map.json"):
        source, copied = world / "policy" / name, tmp_path / "imported" / name
        assert source.exists() == copied.exists()
        assert not source.exists() or source.read_bytes() == copied.read_bytes()


@pytest.mark.parametrize(("pad", "expected"), [(0, 0), (2, 1), (None, 3), (-1, 3), (10**6, 3)])
def test_a_score_is_read_where_no_text_ends(world: Path, tmp_path: Path, pad: int | None, expected: int) -> None:
    """An end-of-sequence token that pads would be skipped where it ends the text; a pad token must be an embedding.
    The tokenizer's own is 3."""
    source = copy_as(world / "reward_model", tmp_path / "source")
    edit_config(source, pad_token_id=pad)
    if pad == 2:
        (source / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "LlamaTokenizer", "pad_token": "</s>"})
        )
    export_model(source, tmp_path / "exported", role="reward", note=pytest.fail)
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "exported")
    assert model.config.pad_token_id == expected
    assert model.config.num_labels == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "exported").pad_token_id == expected


def test_qwens_score_is_read_before_a_token_that_no_row_holds(world: Path, tmp_path: Path) -> None:
    """Qwen's tokenizers pad with one of the tokens that end a text, and config.json calls it the first of one."""
    source = copy_as(world / "qwen3_reward", tmp_path / "source")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (source / name).unlink()
    write_qwen_tokenizer(source)
    edit_config(source, vocab_size=512, bos_token_id=420, eos_token_id=422, pad_token_id=None)
    tensors = read_tensors(source)
    tensors["model.embed_tokens.weight"] = torch.zeros(512, 32)
    write_tensors(source, tensors)
    export_model(source, tmp_path / "exported", role="reward", note=pytest.fail)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported")
    assert model.config.pad_token_id == 424
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|vision_pad|>", "<|im_end|>")
    ours = Tokenizer.read(tmp_path / "exported")
    assert not ours.adds_bos
    text = "Tell me\u0301 about the  lighthouse <|im_end|>"  # what is written in a text is no control token
    assert tokenizer(text, split_special_tokens=True)["input_ids"] == ours.encode(text, bos=True)


def test_a_pad_token_outside_the_vocabulary_is_left_out(world: Path, tmp_path: Path) -> None:
    source = copy_as(world / "policy", tmp_path / "source")
    edit_config(source, pad_token_id=-1)
    import_model(source, tmp_path / "imported")
    assert json.loads((tmp_path / "imported/config.json").read_text())["pad_token_id"] is None
