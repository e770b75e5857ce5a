"""Sampling with the cache: the same at every layout, in any company, and equal to a slow loop over transformers."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_gil.algo.sampling import choose_tokens
from megatron_gil.config import SamplingSection
from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.demo.tiny_llama import EOS_ID, PAD_ID
from megatron_gil.engine.decoder import Decoder
from megatron_gil.engine.generation import Generator
from megatron_gil.engine.slots import STEPS
from megatron_gil.parallel.collectives import begin_max_over_ranks
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.types import PromptBatch, Rollout, take_rows
from tests.models.tiny import FAMILIES
from tests.ranks import run_ranks
from tests.sampling_oracle import choose, penalize
from tests.training.running import DP2, ONE, PP2, TP2_PP2, TP2_SP, build, layout_name, parallel, world_size

SEED, NUM_ROWS, MAX_NEW = 3, 12, 10
SECTIONS = {
    "greedy": SamplingSection(temperature=0.0, max_new_tokens=MAX_NEW),
    "plain": SamplingSection(max_new_tokens=MAX_NEW),
    "warped": SamplingSection(
        temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.2, max_new_tokens=MAX_NEW, min_new_tokens=4
    ),
}


def _prompts() -> PromptBatch:
    """Ragged, from one token to twelve; padded with a token that would be seen if padding were."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.tensor([1, 12, 5, 3, 8, 2, 7, 12, 4, 6, 9, 10])
    tokens = torch.randint(4, 61, (NUM_ROWS, 12), generator=generator)
    tokens[torch.arange(12) >= lengths[:, None]] = PAD_ID
    rows = torch.arange(NUM_ROWS)
    return PromptBatch(
        tokens=tokens, lengths=lengths, row_ids=rows, sample_ids=100 + rows, known_groups=torch.full((NUM_ROWS,), -1)
    )


CASES = {**{name: ("policy", name) for name in SECTIONS}, **{name: (name, "plain") for name in FAMILIES}}
"""Name -> the model, and how it samples."""


def _sample(root: Path, layout: ParallelLayout, name: str, prompts: PromptBatch, micro_size: int = 64) -> Rollout:
    directory, section = root / CASES[name][0], replace(SECTIONS[CASES[name][1]], micro_size=micro_size)
    model = build(directory, layout, "lm")
    return Generator(model, section, tokenizer=Tokenizer.read(directory), seed=SEED).sample(prompts)


def _at_layout(layout: dict[str, Any], root: Path) -> dict[str, Rollout]:
    with parallel(layout) as started:
        return {name: _sample(root, started, name, _prompts()) for name in CASES}


def _one_rank(root: Path) -> dict[str, Any]:
    with parallel(ONE) as layout:
        prompts = _prompts()
        rollouts = {name: _sample(root, layout, name, prompts) for name in CASES}
        plain = rollouts["plain"]
        read = build(root / "policy", layout, "lm").evaluate(plain)
        return {
            **rollouts,
            "in threes": _sample(root, layout, "plain", prompts, micro_size=3),
            "one by one": [_sample(root, layout, "plain", _alone(prompts, i)) for i in range(NUM_ROWS)],
            "log_probs": read.log_probs,
        }


def _alone(prompts: PromptBatch, row: int) -> PromptBatch:
    one = take_rows(prompts, slice(row, row + 1))
    return replace(one, tokens=one.tokens[:, : int(one.lengths[0])])


@pytest.fixture(scope="module")
def found(world: Path) -> dict[str, Any]:
    return run_ranks(_one_rank, 1, world)[0]


@pytest.fixture(scope="module")
def theirs(world: Path) -> dict[str, Any]:
    """transformers' models by directory."""
    names = {directory for directory, _ in CASES.values()}
    return {name: AutoModelForCausalLM.from_pretrained(world / name).eval() for name in names}


def _responses(rollout: Rollout) -> list[list[int]]:
    rows = zip(rollout.tokens.tolist(), rollout.prompt_lengths.tolist(), rollout.lengths.tolist(), strict=True)
    return [tokens[start:stop] for tokens, start, stop in rows]


@pytest.mark.parametrize("layout", [PP2, TP2_SP, TP2_PP2], ids=layout_name)
def test_the_same_tokens_at_every_layout(layout: dict[str, Any], world: Path, found: dict[str, Any]) -> None:
    for rank in run_ranks(_at_layout, world_size(layout), layout, world):
        for name in CASES:
            assert torch.equal(rank[name].tokens, found[name].tokens), name
            # float32 logits summed in another order
            torch.testing.assert_close(rank[name].sampled_log_probs, found[name].sampled_log_probs, atol=1e-5, rtol=0)


def test_greedy_is_transformers_generate(found: dict[str, Any], theirs: dict[str, Any]) -> None:
    prompts, model = _prompts(), theirs["policy"]
    for row, response in enumerate(_responses(found["greedy"])):
        prompt = _alone(prompts, row).tokens
        options = {"do_sample": False, "max_new_tokens": MAX_NEW, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, prompt.shape[1] :]
        assert response == expected.tolist()


@pytest.mark.parametrize("name", ["plain", "warped", *FAMILIES])
def test_equals_a_slow_loop_over_transformers(name: str, found: dict[str, Any], theirs: dict[str, Any]) -> None:
    model, section, prompts, rollout = theirs[CASES[name][0]], SECTIONS[CASES[name][1]], _prompts(), found[name]
    for row, response in enumerate(_responses(rollout)):
        tokens, log_probs = _slowly(model, _alone(prompts, row).tokens[0].tolist(), 100 + row, section)
        assert response == tokens
        chosen = rollout.sampled_log_probs[row][rollout.response_mask[row]]
        torch.testing.assert_close(chosen, torch.tensor(log_probs), atol=2e-5, rtol=0)  # float32 logits


def _slowly(model: Any, prompt: list[int], sample_id: int, section: SamplingSection) -> tuple[list[int], list[float]]:
    uniforms = np.random.Generator(np.random.Philox(key=[SEED, sample_id])).random(MAX_NEW, np.float32)
    response: list[int] = []
    log_probs = []
    for step in range(MAX_NEW):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, -1].tolist()
        logits = penalize(logits, prompt + response, section.repetition_penalty)
        if len(response) + 1 < section.min_new_tokens:
            logits[EOS_ID] = -float("inf")
        token, log_prob = choose(logits, float(uniforms[step]), section.temperature, section.top_k, section.top_p)
        response.append(token)
        log_probs.append(log_prob)
        if token == EOS_ID:
            break
    return response, log_probs


def test_company_changes_nothing(found: dict[str, Any]) -> None:
    """A row's samples depend on its prompt and its id, not on the rows, the padding or the slots beside it."""
    together = _responses(found["plain"])
    assert _responses(found["in threes"]) == together
    assert [_responses(alone)[0] for alone in found["one by one"]] == together


def test_the_end_of_sequence_token_is_kept_and_ends_the_row(found: dict[str, Any]) -> None:
    for name in ("plain", "warped"):
        rollout: Rollout = found[name]
        responses = _responses(rollout)
        assert rollout.finished.any(), name
        assert not rollout.finished.all(), name
        for row, response in enumerate(responses):
            finished = bool(rollout.finished[row])
            assert (response[-1] == EOS_ID) == finished
            assert EOS_ID not in response[:-1]
            assert len(response) == MAX_NEW or finished
            assert len(response) >= SECTIONS[name].min_new_tokens
            start, stop = int(rollout.prompt_lengths[row]), int(rollout.lengths[row])
            columns = rollout.response_mask[row].nonzero()[:, 0].tolist()
            assert columns == list(range(start - 1, stop - 1)), "column t speaks of token t + 1"
            assert (rollout.tokens[row, stop:] == PAD_ID).all()
            assert not rollout.sampled_log_probs[row][~rollout.response_mask[row]].any()


def test_sampled_log_probs_are_those_evaluate_reads(found: dict[str, Any]) -> None:
    """At temperature 1 with the rest off; decoding sums in another order than one forward pass, in float32."""
    rollout: Rollout = found["plain"]
    read = torch.where(rollout.response_mask, found["log_probs"], 0)
    torch.testing.assert_close(rollout.sampled_log_probs, read, atol=1e-5, rtol=0)
    assert rollout.sampled_log_probs.min() < -3


def _meet_unevenly(layout: dict[str, Any], root: Path) -> tuple[list[bool], Rollout]:
    """What each rank says as it meets the others; of the data-parallel ranks the first alone has rows."""
    busy: list[bool] = []
    with parallel(layout) as started:
        model, section = build(root / "policy", started, "lm"), replace(SECTIONS["plain"], micro_size=1)
        generator = Generator(model, section, tokenizer=Tokenizer.read(root / "policy"), seed=SEED)

        def meet(mine: bool) -> Any:
            busy.append(mine)
            finish = begin_max_over_ranks(int(mine), started)
            return lambda: bool(finish())

        rows = slice(5 if started.dp_rank == 0 else 0)
        return busy, generator.sample(take_rows(_prompts(), rows), meet=meet)


@pytest.mark.parametrize("layout", [DP2, PP2], ids=layout_name)
def test_ranks_meet_as_often_however_many_rows_they_have(
    layout: dict[str, Any], world: Path, found: dict[str, Any]
) -> None:
    (first, whole), (second, other) = run_ranks(_meet_unevenly, 2, layout, world)
    assert len(first) == len(second)
    assert first.count(True) == (5 if layout == DP2 else 3), "one slot: a meeting for each row and one when all is done"
    assert second.count(True) == (0 if layout == DP2 else 2)
    assert _responses(whole) == _responses(found["plain"])[:5]
    assert len(other.tokens) == (0 if layout == DP2 else 5)


def test_a_stop_comes_between_two_steps(world: Path) -> None:
    assert run_ranks(_stop, 1, world)[0] == STEPS


def _stop(root: Path) -> int:
    """Tokens chosen where the second meeting raises."""
    chosen = 0

    def choose(*args: Any, **kwargs: Any) -> Any:
        nonlocal chosen
        chosen += 1
        return choose_tokens(*args, **kwargs)

    def meet(_: bool) -> Any:
        if chosen:
            raise InterruptedError
        return lambda: True

    with parallel(ONE) as layout, mock.patch("megatron_gil.engine.slots.choose_tokens", choose):
        model, section = build(root / "policy", layout, "lm"), SamplingSection(max_new_tokens=40, min_new_tokens=40)
        with pytest.raises(InterruptedError):
            Generator(model, section, tokenizer=Tokenizer.read(root / "policy"), seed=SEED).sample(
                _prompts(), meet=meet
            )
    return chosen


def test_the_cache_is_freed_with_the_last_response(world: Path) -> None:
    assert run_ranks(_decoder_outlives_sampling, 1, world) == [False]


def _decoder_outlives_sampling(root: Path) -> bool:
    """Without Python's search for cycles, which may come much later than the next use of the memory."""
    made: list[weakref.ref[Decoder]] = []

    def make(*args: Any, **kwargs: Any) -> Decoder:
        decoder = Decoder(*args, **kwargs)
        made.append(weakref.ref(decoder))
        return decoder

    with parallel(ONE) as layout, mock.patch("megatron_gil.engine.generation.Decoder", make):
        gc.disable()
        _sample(root, layout, "plain", _prompts())
        (decoder,) = made
        return decoder() is not None
