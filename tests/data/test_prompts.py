from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gil.data.rows.dataset import number_groups
from megatron_gil.data.rows.encoding import EncodedPrompt, encode_prompt
from megatron_gil.data.rows.order import RowOrder
from megatron_gil.data.rows.prompts import PromptDataset
from megatron_gil.data.text.tokenizer import Tokenizer

LONG = (
    "".join(f"\n\nHuman: question {i}\n\nAssistant: answer {i}" for i in range(9)) + "\n\nHuman: the last\n\nAssistant:"
)
prompts = st.text(min_size=1, max_size=80) | st.lists(
    st.sampled_from(["\n\nHuman:", "\n\nAssistant:", " the lamp", "é", " ", "\n\nHuman: q\n\nAssistant:"]), min_size=1
).map("".join)


def test_prompts_are_padded_on_the_right_and_keep_their_ids(
    write_rows: Callable[..., Path], plain_tokenizer: Tokenizer
):
    texts = ["a", "the little girl loved to play", "TL;DR:"]
    dataset = PromptDataset(write_rows([{"prompt": t} for t in texts]), plain_tokenizer, max_prompt_tokens=64)
    row_ids = [1, 1, 0, 2]
    batch = dataset.collate(row_ids, [4, 5, 6, 7])
    expected = [plain_tokenizer.encode(texts[i], bos=True) for i in row_ids]
    assert batch.tokens.shape == (4, max(map(len, expected)))
    for tokens, length, ids in zip(batch.tokens.tolist(), batch.lengths.tolist(), expected, strict=True):
        assert tokens[:length] == ids
        assert set(tokens[length:]) <= {plain_tokenizer.pad_id}
    assert batch.row_ids.tolist() == row_ids
    assert batch.sample_ids.tolist() == [4, 5, 6, 7]
    assert batch.known_groups.tolist() == [-1] * 4
    assert len(dataset) == 3
    assert [dataset.text(i) for i in range(3)] == texts


def test_a_draw_of_the_sampler_is_a_batch(write_rows: Callable[..., Path], plain_tokenizer: Tokenizer):
    path = write_rows([{"prompt": f"number {i}"} for i in range(10)])
    dataset = PromptDataset(path, plain_tokenizer, max_prompt_tokens=64)
    batch = dataset.collate(*RowOrder(10, seed=1, batch_size=2, repeats=3).next(0))
    texts = [plain_tokenizer.decode(row[:n]) for row, n in zip(batch.tokens.tolist(), batch.lengths, strict=True)]
    assert texts == [f"number {i}" for i in batch.row_ids]
    assert texts[0] == texts[2] != texts[3]


def test_group_labels_are_numbered_in_their_own_order_not_the_files():
    assert number_groups(["b", None, "a", "b"])[0] == ("a", "b")
    assert number_groups(["b", None, "a", "b"])[1].tolist() == [1, -1, 0, 1]
    assert number_groups(["10", "9", "-1"])[0] == ("-1", "9", "10")
    assert number_groups(["10", "9", "x"])[0] == ("10", "9", "x")
    assert number_groups([None])[0] == ()


def test_known_groups_come_with_the_batch(write_rows: Callable[..., Path], plain_tokenizer: Tokenizer):
    rows = [{"prompt": "a", "group": 12}, {"prompt": "b"}, {"prompt": "c", "group": 3}]
    dataset = PromptDataset(write_rows(rows), plain_tokenizer, max_prompt_tokens=8)
    assert dataset.group_names == ("3", "12")
    assert dataset.collate([0, 1, 2], [0, 1, 2]).known_groups.tolist() == [1, -1, 0]


def test_a_long_conversation_loses_its_oldest_exchanges(write_rows: Callable[..., Path], plain_tokenizer: Tokenizer):
    dataset = PromptDataset(write_rows([{"prompt": LONG}, {"prompt": "hi"}]), plain_tokenizer, max_prompt_tokens=60)
    batch = dataset.collate([0, 1], [0, 1])
    kept = plain_tokenizer.decode(batch.tokens[0, : batch.lengths[0]].tolist())
    start = LONG.index(kept)
    assert LONG.endswith(kept)
    assert kept.startswith("\n\nHuman: question")
    one_more = LONG[LONG.rindex("\n\nHuman:", 0, start) :]
    assert len(plain_tokenizer.encode(one_more, bos=True)) > 60
    assert dataset.truncated([1, 0, 0]) == [False, True, True]
    assert dataset.text(0) == LONG
    assert dataset.read_prompt(0) == kept
    assert dataset.read_prompt(1) == "hi"


def test_the_system_text_goes_before_the_last_question(plain_tokenizer: Tokenizer):
    with_system = "Be kind." + LONG
    room = len(plain_tokenizer.encode("Be kind.\n\nHuman: the last\n\nAssistant:", bos=True))
    for max_tokens, expected in (
        (room, "Be kind.\n\nHuman: the last\n\nAssistant:"),
        (room - 1, "\n\nHuman: the last\n\nAssistant:"),
    ):
        found = encode_prompt(plain_tokenizer, with_system, max_tokens)
        assert (plain_tokenizer.decode(found.tokens), found.cut, found.read) == (expected, True, expected)


def test_what_is_no_conversation_loses_its_oldest_tokens(plain_tokenizer: Tokenizer):
    post = "POST: " + "lost my keys twice " * 20 + "TL;DR:"
    whole = plain_tokenizer.encode(post, bos=True)

    def expected(tokens: list[int]) -> EncodedPrompt:
        read = plain_tokenizer.decode(tokens) if len(tokens) < len(whole) else post
        return EncodedPrompt(tokens=tokens, num_tokens=len(whole), read=read)

    assert encode_prompt(plain_tokenizer, post, 20) == expected([whole[0], *whole[-19:]])
    assert encode_prompt(plain_tokenizer, post, 1) == expected(whole[-1:])
    assert encode_prompt(plain_tokenizer, post, len(whole)) == expected(whole)


@settings(deadline=None)
@given(prompt=prompts, max_tokens=st.integers(1, 40))
@pytest.mark.parametrize("name", ["plain_tokenizer", "chat_tokenizer"])
def test_every_prompt_fits_and_ends_as_it_did(request: pytest.FixtureRequest, name: str, prompt: str, max_tokens: int):
    tokenizer: Tokenizer = request.getfixturevalue(name)
    prompt = prompt.rstrip() or "?"  # a cut conversation ends in "Assistant:" even if a space followed
    whole = encode_prompt(tokenizer, prompt, 10_000)
    found = encode_prompt(tokenizer, prompt, max_tokens)
    assert 0 < len(found.tokens) <= max_tokens
    assert found.cut == (len(whole.tokens) > max_tokens)
    assert found.num_tokens == len(whole.tokens)
    assert found.tokens[-1] == whole.tokens[-1]
    assert found.cut or found == whole


def test_a_chat_template_formats_conversations_in_either_form_and_no_other_text(
    write_rows: Callable[..., Path], chat_tokenizer: Tokenizer, byte_level_dir: Path
):
    from tokenizers import Tokenizer as Fast

    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "who?"},
    ]
    text = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: who?\n\nAssistant:"
    rows = [{"messages": messages}, {"prompt": text}, {"prompt": "Once upon a time"}]
    dataset = PromptDataset(write_rows(rows), chat_tokenizer, max_prompt_tokens=200)
    turns = "<|role|>user\nhi<|eot|>\n<|role|>assistant\nhello<|eot|>\n<|role|>user\nwho?<|eot|>\n"
    rendered = f"<|begin|>{turns}<|role|>assistant\n"
    assert [dataset.text(i) for i in range(3)] == [rendered, rendered, "Once upon a time"]
    batch = dataset.collate([0, 1, 2], [0, 1, 2])
    assert batch.tokens[0].equal(batch.tokens[1])
    template_only = Fast.from_file(str(byte_level_dir / "tokenizer.json"))  # which knows control tokens in any text
    template_only.no_truncation()
    template_only.no_padding()
    expected = template_only.encode(rendered, add_special_tokens=False).ids
    assert batch.tokens[0, : batch.lengths[0]].tolist() == expected
    assert (batch.tokens[:, 0] == chat_tokenizer.bos_id).all()
    assert (batch.tokens[0] == chat_tokenizer.bos_id).sum() == 1  # the template's, not a second one
    assert [dataset.fields(i) for i in range(3)] == [{"prompt": text, "messages": messages}, *rows[1:]]
