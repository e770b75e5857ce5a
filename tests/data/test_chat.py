from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from megatron_gil.data.text.chat import format_dialogue, merge_neighbours, parse_dialogue, split_exchanges

said = st.text(min_size=1).map(str.strip).filter(bool).filter(lambda s: "Human:" not in s and "Assistant:" not in s)
role = st.sampled_from(["system", "user", "assistant"])
messages = st.lists(st.fixed_dictionaries({"role": role, "content": said}), min_size=1, max_size=8)


@given(system=st.none() | said, turns=st.lists(said, min_size=1, max_size=6))
def test_a_dialogue_comes_back_from_its_text(system: str | None, turns: list[str]):
    dialogue = [{"role": "system", "content": system}] if system else []
    odd = turns if len(turns) % 2 else turns[:-1] or ["hi"]
    dialogue += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(odd)]
    assert parse_dialogue(format_dialogue(dialogue)) == dialogue


def test_text_in_another_form_is_no_dialogue():
    for text in (
        "",
        "Tell me about Human: rights",
        "\n\nHuman: hi",  # nothing to response to
        "\n\nHuman: hi\n\nAssistant: hello",  # already replied to
        "\n\nAssistant: hi\n\nHuman: hello\n\nAssistant:",
        "SUBREDDIT: r/x\n\nPOST: a\n\nTL;DR:",
    ):
        assert parse_dialogue(text) is None


@given(text=st.text())
def test_any_text_is_survived(text: str):
    for candidate in (
        text,
        f"\n\nHuman:{text}\n\nAssistant:",
        f"{text}\n\nHuman: a\n\nAssistant: {text}\n\nAssistant:",
    ):
        parsed = parse_dialogue(candidate)
        assert parsed is None or all(message.keys() == {"role", "content"} for message in parsed)


@given(messages=messages)
def test_exchanges_begin_with_a_question_and_lose_nothing(messages: list[dict[str, str]]):
    system, exchanges = split_exchanges(messages)
    assert [*system, *(message for exchange in exchanges for message in exchange)] == messages
    assert all(exchange[0]["role"] == "user" for exchange in exchanges[1:])
    for exchange in exchanges:  # no question after a response within one
        assert ("assistant", "user") not in {(a["role"], b["role"]) for a, b in pairwise(exchange)}


@given(messages=messages)
def test_merged_neighbours_alternate_and_keep_the_text(messages: list[dict[str, str]]):
    merged = merge_neighbours(messages)
    assert all(a["role"] != b["role"] for a, b in pairwise(merged))
    assert "\n\n".join(m["content"] for m in merged) == "\n\n".join(m["content"] for m in messages)
