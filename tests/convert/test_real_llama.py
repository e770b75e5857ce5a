"""A really trained Llama: in, answered under tp2 x pp2, out, and the same text from transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from megatron_gil.config import SamplingSection
from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.engine.generation import Generator
from megatron_gil.engine.megatron import MegatronModel
from megatron_gil.models.convert.copy import export_model, import_model
from megatron_gil.models.families import read_spec
from megatron_gil.types import PromptBatch
from tests.convert.directories import assert_equal_bits, read_tensors
from tests.models.running import parallel
from tests.ranks import run_ranks

PROMPTS = ("Once upon a time, there was a little girl", "The big dog", "Tom and Lily found a red ball. They")
NUM_NEW = 60


def _greedy(directory: Path) -> list[str]:
    """Prompts of three lengths, answered as one batch."""
    tokenizer = Tokenizer.read(directory)
    rows = [torch.tensor(tokenizer.encode(prompt, bos=True)) for prompt in PROMPTS]
    prompts = PromptBatch(
        tokens=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_id),
        lengths=torch.tensor([len(row) for row in rows]),
        row_ids=torch.arange(len(rows)),
        sample_ids=torch.arange(len(rows)),
        known_groups=torch.full((len(rows),), -1),
    )
    with parallel({"tensor_size": 2, "pipeline_size": 2}) as layout:  # five layers: three and two
        model = MegatronModel(read_spec(directory), layout, head="lm", micro_size=1)
        model.load(directory)
        section = SamplingSection(temperature=0.0, max_new_tokens=NUM_NEW)
        rollout = Generator(model, section, tokenizer=tokenizer, seed=1).sample(prompts)
    lengths = rollout.lengths.tolist()
    return [tokenizer.decode(row[:length].tolist()) for row, length in zip(rollout.tokens, lengths, strict=True)]


def test_greedy_text_equals_transformers(stories: Path, tmp_path: Path) -> None:
    import_model(stories, tmp_path / "imported")
    export_model(tmp_path / "imported", tmp_path / "exported", role="policy", note=print)
    assert_equal_bits(read_tensors(tmp_path / "exported"), read_tensors(stories))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    model: Any = LlamaForCausalLM.from_pretrained(tmp_path / "exported")
    expected = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=NUM_NEW)
        expected.append(tokenizer.decode(output[0], skip_special_tokens=True))
    assert "named Lily" in expected[0]
    for found in run_ranks(_greedy, 4, tmp_path / "imported"):
        assert found == expected
