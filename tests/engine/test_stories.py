"""A really trained Llama: the text of `transformers.generate`, at every layout and number of slots."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from megatron_gil.config import SamplingSection
from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.engine.generation import Generator
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.types import PromptBatch, Rollout
from tests.ranks import run_ranks
from tests.training.running import DP2, ONE, PP2, TP2, TP2_PP2, build, layout_name, parallel, world_size

TEXT = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her dog. One day "
    "she saw a big tree with red apples. She wanted to eat one, but it was too high. Her mom said: I can help you."
)
NUM_NEW, SLOTS = 24, (1, 5, 64)


@pytest.fixture(scope="module")
def stories() -> Path:
    root = Path(os.environ.get("MEGATRON_GIL_DATA", Path(__file__).parents[2] / "../shared/data"))
    if not (root / "stories260k-hf").is_dir():
        pytest.skip(f"MEGATRON_GIL_DATA={root} holds no stories260k-hf")
    return (root / "stories260k-hf").resolve()


def _prompts(stories: Path, layout: ParallelLayout | None = None) -> PromptBatch:
    """The text's beginnings, one token long and more; those of this data-parallel rank."""
    ids = Tokenizer.read(stories).encode(TEXT, bos=True)
    rows = torch.arange(len(ids))
    if layout is not None:
        rows = rows[layout.dp_rank :: layout.dp_size]
    tokens = torch.tensor(ids).expand(len(rows), -1)
    tokens = torch.where(torch.arange(len(ids)) <= rows[:, None], tokens, 0)
    labels = torch.full((len(rows),), -1)
    return PromptBatch(tokens=tokens, lengths=rows + 1, row_ids=rows, sample_ids=rows, known_groups=labels)


def _sample(stories: Path, layout: ParallelLayout, slots: int, temperature: float) -> Rollout:
    section = SamplingSection(temperature=temperature, max_new_tokens=NUM_NEW, micro_size=slots)
    model = build(stories, layout, "lm")
    return Generator(model, section, tokenizer=Tokenizer.read(stories), seed=1).sample(_prompts(stories, layout))


def _texts(rollout: Rollout) -> dict[int, list[int]]:
    rows = zip(rollout.tokens.tolist(), rollout.prompt_lengths.tolist(), rollout.lengths.tolist(), strict=True)
    return dict(zip(rollout.row_ids.tolist(), [row[start:stop] for row, start, stop in rows], strict=True))


def _greedy(layout: dict[str, Any], stories: Path) -> dict[int, dict[int, list[int]]]:
    with parallel(layout) as started:
        return {slots: _texts(_sample(stories, started, slots, 0.0)) for slots in SLOTS}


@pytest.fixture(scope="module")
def expected(stories: Path) -> dict[int, list[int]]:
    llama: Any = LlamaForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    prompts, texts = _prompts(stories), {}
    for row, length in enumerate(prompts.lengths.tolist()):
        prompt = prompts.tokens[row : row + 1, :length]
        options = {"do_sample": False, "max_new_tokens": NUM_NEW, "eos_token_id": 2, "pad_token_id": 0}
        texts[row] = llama.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, length:].tolist()
    return texts


@pytest.mark.parametrize("layout", [ONE, TP2, PP2, TP2_PP2, DP2], ids=layout_name)
def test_greedy_text_is_transformers(layout: dict[str, Any], stories: Path, expected: dict[int, list[int]]) -> None:
    ranks = run_ranks(_greedy, world_size(layout), layout, stories)
    for slots in SLOTS:
        found: dict[int, list[int]] = {}
        for rank in ranks:
            for row, text in rank[slots].items():
                assert found.setdefault(row, text) == text, "ranks of a model copy differ"
        assert found == expected, f"{slots} slots"
    assert len(expected) > max(SLOTS)


def _sampled(stories: Path) -> tuple[list[Rollout], list[torch.Tensor]]:
    with parallel(ONE) as layout:
        rollouts = [_sample(stories, layout, slots, 1.0) for slots in SLOTS]
        model = build(stories, layout, "lm")
        return rollouts, [model.evaluate(rollout).log_probs for rollout in rollouts]


def test_sampled_log_probs_are_the_trainers(stories: Path) -> None:
    rollouts, read = run_ranks(_sampled, 1, stories)[0]
    for rollout, log_probs in zip(rollouts, read, strict=True):
        assert torch.equal(rollout.tokens, rollouts[0].tokens)
        assert rollout.finished.any() or rollout.sampled_log_probs.min() < -3
        differences = (rollout.sampled_log_probs - torch.where(rollout.response_mask, log_probs, 0)).abs()
        # float32: the trainer's own are up to 2e-5 from what it says in float64, and the decoder's up to 1.6e-5
        assert (differences <= 1e-5).float().mean() > 0.999
        assert differences.max() < 5e-5
