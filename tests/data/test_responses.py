"""Demonstrations, responses, texts and preferences against an oracle in plain lists."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gil.config import ConfigError
from megatron_gil.data.rows.demonstrations import DemonstrationDataset, ResponseDataset, TextDataset
from megatron_gil.data.rows.encoding import encode_conversation, encode_responses
from megatron_gil.data.rows.preferences import PreferenceDataset
from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.types import PreferenceBatch, TokenBatch

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Is the sea old?"},
    {"role": "assistant", "content": "Very."},
    {"role": "user", "content": "How old?"},
    {"role": "assistant", "content": "Nobody counted."},
]
LIMITS: dict[str, Any] = {"max_tokens": 200, "max_prompt_tokens": 100}
roles = st.lists(st.sampled_from(["user", "assistant", "user"]), min_size=1, max_size=8)
words = st.text(min_size=1, max_size=30).filter(str.strip)


def trained_tokens(batch: TokenBatch, row: int) -> list[int]:
    """The tokens whose choice is imitated, by the legend of types.py."""
    mask = batch.response_mask[row].tolist()
    return [int(batch.tokens[row, t + 1]) for t in range(len(mask)) if mask[t]]


def trained_runs(tokens: list[int], is_response: list[bool]) -> list[list[int]]:
    runs: list[list[int]] = []
    for i, token in enumerate(tokens):
        if is_response[i]:
            if not is_response[i - 1]:
                runs.append([])
            runs[-1].append(token)
    return runs


def test_a_demonstration_is_prompt_response_and_end(write_rows: Callable[..., Path], plain_tokenizer: Tokenizer):
    rows = [{"prompt": "\n\nHuman: hi\n\nAssistant:", "completion": " hello there"}, {"prompt": "a", "completion": "b"}]
    dataset = DemonstrationDataset(write_rows(rows), plain_tokenizer, **LIMITS)
    batch = dataset.collate([1, 0, 0])
    assert batch.tokens.shape[1] == max(batch.lengths)
    assert batch.response_mask.shape == (3, batch.tokens.shape[1] - 1)
    assert batch.row_ids.tolist() == [1, 0, 0]
    for i, row_id in enumerate([1, 0, 0]):
        prompt = plain_tokenizer.encode(rows[row_id]["prompt"], bos=True)
        response = [*plain_tokenizer.encode_continuation(rows[row_id]["completion"]), plain_tokenizer.eos_id]
        assert batch.tokens[i, : batch.lengths[i]].tolist() == prompt + response
        assert trained_tokens(batch, i) == response
    assert dataset.text(0) == (rows[0]["prompt"], " hello there")
    assert dataset.truncated([0, 1]) == [False, False]


def test_a_long_response_is_cut_at_its_end_without_an_end_token(
    write_rows: Callable[..., Path], plain_tokenizer: Tokenizer
):
    rows = [{"prompt": "a", "completion": " the little girl" * 50}, {"prompt": "the sea " * 50, "completion": " yes"}]
    dataset = DemonstrationDataset(write_rows(rows), plain_tokenizer, max_tokens=30, max_prompt_tokens=20)
    batch = dataset.collate([0, 1])
    prompt = plain_tokenizer.encode("a", bos=True)
    whole = [*prompt, *plain_tokenizer.encode_continuation(rows[0]["completion"])]
    assert batch.tokens[0].tolist() == whole[:30]
    assert trained_tokens(batch, 0) == whole[len(prompt) : 30]
    assert trained_tokens(batch, 1) == [*plain_tokenizer.encode_continuation(" yes"), plain_tokenizer.eos_id]
    assert dataset.truncated([0, 1]) == [True, True]


def test_without_a_template_every_turn_is_imitated_and_the_last_one_ended(plain_tokenizer: Tokenizer):
    row = encode_conversation(plain_tokenizer, TALK, **LIMITS)
    text = "Be kind.\n\nHuman: Is the sea old?\n\nAssistant: Very.\n\nHuman: How old?\n\nAssistant: Nobody counted."
    assert plain_tokenizer.decode(row.tokens) == text
    first, last = trained_runs(row.tokens, row.is_response)
    assert first == plain_tokenizer.encode_continuation(" Very.")
    assert last == [*plain_tokenizer.encode_continuation(" Nobody counted."), plain_tokenizer.eos_id]
    assert row.tokens.count(plain_tokenizer.eos_id) == 1
    # what precedes the last response is the prompt that generation would be given
    prompt = plain_tokenizer.encode(plain_tokenizer.format_prompt(TALK[:-1]), bos=True)
    assert row.tokens[: len(prompt)] == prompt


def test_with_a_template_every_turn_is_imitated_with_its_end(chat_tokenizer: Tokenizer):
    row = encode_conversation(chat_tokenizer, TALK, **LIMITS)
    runs = trained_runs(row.tokens, row.is_response)
    ended = [[*chat_tokenizer.encode(text), chat_tokenizer.eos_id] for text in ("Very.", "Nobody counted.")]
    assert runs == ended  # and not the line end that the template writes after it
    prompt = chat_tokenizer.encode(chat_tokenizer.format_prompt(TALK[:-1]), bos=True)
    assert row.tokens[: len(prompt)] == prompt


def test_a_template_that_rewrites_earlier_turns_has_its_last_response_imitated(byte_level_dir: Path):
    tokenizer = Tokenizer.read(byte_level_dir)
    forgets = (
        "{{ bos_token }}{{ messages | length }}{{ messages[-1]['content'] }}{% if add_generation_prompt %}>{% endif %}"
    )
    files = {name: (byte_level_dir / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    tokenizer = Tokenizer("rewrites", {**files, "chat_template.jinja": forgets.encode()})
    row = encode_conversation(tokenizer, TALK, **LIMITS)
    assert trained_runs(row.tokens, row.is_response) == [[*tokenizer.encode("Nobody counted."), tokenizer.eos_id]]
    assert tokenizer.decode(row.tokens) == "4How old?>Nobody counted."


@pytest.mark.parametrize("name", ["plain_tokenizer", "chat_tokenizer"])
def test_a_long_conversation_loses_its_oldest_exchanges(request: pytest.FixtureRequest, name: str):
    tokenizer: Tokenizer = request.getfixturevalue(name)
    talk = [TALK[0], *(turn for i in range(9) for turn in ({"role": "user", "content": f"q {i}"}, TALK[2])), *TALK[3:]]
    for kept in (1, 2, 5):
        shorter = [TALK[0], *talk[len(talk) - 2 * kept :]]
        expected = encode_conversation(tokenizer, shorter, max_tokens=10_000, max_prompt_tokens=9_000)
        row = encode_conversation(tokenizer, talk, max_tokens=len(expected.tokens), max_prompt_tokens=9)
        assert (row.tokens, row.is_response, row.prompt_cut) == (expected.tokens, expected.is_response, True)


@settings(deadline=None)
@given(roles=roles, data=st.data(), max_tokens=st.integers(6, 80))
@pytest.mark.parametrize("name", ["plain_tokenizer", "chat_tokenizer"])
def test_every_conversation_fits_and_has_a_response(
    request: pytest.FixtureRequest, name: str, roles: list[str], data: st.DataObject, max_tokens: int
):
    tokenizer: Tokenizer = request.getfixturevalue(name)
    talk = [{"role": role, "content": data.draw(words)} for role in [*roles, "assistant"]]
    row = encode_conversation(tokenizer, talk, max_tokens=max_tokens, max_prompt_tokens=max_tokens - 3)
    assert len(row.tokens) == len(row.is_response) <= max_tokens
    assert row.is_response[-1] or name == "chat_tokenizer"
    assert any(row.is_response)
    assert not row.is_response[0]


def test_a_response_may_be_empty_and_a_completion_may_not(write_rows: Callable[..., Path], plain_tokenizer: Tokenizer):
    path = write_rows([{"prompt": "a", "response": "", "completion": ""}])
    batch = ResponseDataset(path, plain_tokenizer, **LIMITS).collate([0])
    assert trained_tokens(batch, 0) == [plain_tokenizer.eos_id]
    with pytest.raises(ConfigError, match="field completion is empty"):
        DemonstrationDataset(path, plain_tokenizer, **LIMITS)


def test_of_a_text_every_token_is_imitated(write_rows: Callable[..., Path], plain_tokenizer: Tokenizer):
    rows = [{"text": "Once upon a time"}, {"prompt": "a", "completion": "b"}, {"text": "the sea " * 90}]
    dataset = TextDataset(write_rows(rows), plain_tokenizer, max_tokens=50, max_prompt_tokens=20)
    batch = dataset.collate([0, 1, 2])
    ids = plain_tokenizer.encode("Once upon a time", bos=True)
    assert trained_tokens(batch, 0) == [*ids[1:], plain_tokenizer.eos_id]
    assert trained_tokens(batch, 1) == [*plain_tokenizer.encode_continuation("b"), plain_tokenizer.eos_id]
    assert trained_tokens(batch, 2) == plain_tokenizer.encode(rows[2]["text"], bos=True)[1:50]
    assert dataset.truncated([0, 1, 2]) == [False, False, True]


def test_a_preference_is_two_responses_to_one_prompt(write_rows: Callable[..., Path], plain_tokenizer: Tokenizer):
    rows = [
        {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": " hello there", "rejected": " no", "group": "x"},
        {"prompt": "a", "chosen": "b", "rejected": "the little girl"},
    ]
    dataset = PreferenceDataset(write_rows(rows), plain_tokenizer, **LIMITS)
    batch: PreferenceBatch = dataset.collate([1, 0])
    assert batch.tokens.shape == (2, 2, batch.tokens.shape[-1])
    assert batch.ref_log_probs.tolist() == [[0, 0], [0, 0]]
    for i, row_id in enumerate([1, 0]):
        prompt = plain_tokenizer.encode(rows[row_id]["prompt"], bos=True)
        for side, name in enumerate(("chosen", "rejected")):
            response = [*plain_tokenizer.encode_continuation(rows[row_id][name]), plain_tokenizer.eos_id]
            length = int(batch.lengths[i, side])
            assert batch.tokens[i, side, :length].tolist() == prompt + response
            expected = [len(prompt) <= t + 1 < length for t in range(batch.tokens.shape[-1] - 1)]
            assert batch.response_mask[i, side].tolist() == expected
    assert dataset.known_groups([0, 1]) == [0, -1]
    assert dataset.text(1) == ("a", "b", "the little girl")


def test_a_response_to_a_template_loses_the_space_of_the_plain_form(chat_tokenizer: Tokenizer):
    for prompt, expected in (("\n\nHuman: hi\n\nAssistant:", "hello"), ("Once upon", " hello")):
        row = encode_responses(chat_tokenizer, prompt, [" hello"], **LIMITS)[0]
        assert trained_runs(row.tokens, row.is_response) == [[*chat_tokenizer.encode(expected), chat_tokenizer.eos_id]]


def test_limits_that_leave_no_room_for_a_response_are_refused(
    write_rows: Callable[..., Path], plain_tokenizer: Tokenizer
):
    path = write_rows([{"prompt": "a", "completion": "b"}])
    with pytest.raises(ConfigError, match="max_prompt_tokens=64 leaves no room"):
        DemonstrationDataset(path, plain_tokenizer, max_tokens=64, max_prompt_tokens=64)
