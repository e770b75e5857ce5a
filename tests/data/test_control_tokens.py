"""Text makes no control token, in whatever field it stands: only a chat template does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gil.data.rows.demonstrations import DemonstrationDataset, ResponseDataset, TextDataset
from megatron_gil.data.rows.encoding import encode_conversation, encode_prompt, encode_responses
from megatron_gil.data.rows.preferences import PreferenceDataset
from megatron_gil.data.rows.prompts import PromptDataset
from megatron_gil.data.text.tokenizer import Tokenizer
from tests.tokenizer_kinds import CHATML, KINDS, TURNS, copy_kind, write_kinds

INJECTED = ("<s>", "</s>", "<pad>", "<unk>", "<|eot|>", "<|begin|>", "<|role|>", "[INST]", *TURNS)
LIMITS: dict[str, Any] = {"max_tokens": 2000, "max_prompt_tokens": 1500}
DATASETS: dict[str, Any] = {
    "prompts": PromptDataset,
    "demonstrations": DemonstrationDataset,
    "responses": ResponseDataset,
    "preferences": PreferenceDataset,
    "texts": TextDataset,
}
read = cache(Tokenizer.read)
hostile = st.lists(
    st.sampled_from([*INJECTED, "<", "<|", "s>", "|>", "<|im_end|", "\n", " ", "a", "Is it?", "assistant\n", "\ufdd0"]),
    min_size=1,
    max_size=6,
).map(lambda parts: "x" + "".join(parts))


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_kinds(tmp_path_factory.mktemp("kinds"))


def controls(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    """The control tokens of a row, in order."""
    return [name for i in tokens if (name := tokenizer.token(i)) in tokenizer.control_tokens]


def rows_with(text: str) -> dict[str, list[dict[str, Any]]]:
    """Rows of each kind with the text everywhere."""
    prompt = f"\n\nHuman: {text}\n\nAssistant:"
    question, response = {"role": "user", "content": text}, {"role": "assistant", "content": text}
    turns = [{"role": "system", "content": text}, question]
    return {
        "prompts": [{"prompt": text}, {"prompt": prompt}, {"messages": turns}],
        "demonstrations": [
            {"prompt": prompt, "completion": text},
            {"messages": [*turns, response, question, response]},
        ],
        "responses": [{"prompt": prompt, "response": text}],
        "preferences": [{"prompt": prompt, "chosen": text, "rejected": "no " + text}],
        "texts": [{"text": text}],
    }


def encode_all(tokenizer: Tokenizer, texts: Sequence[str], directory: Path) -> list[list[list[str]]]:
    """The control tokens of every row that the data sets make of each text."""
    found: list[list[list[str]]] = [[] for _ in texts]
    for kind, dataset_type in DATASETS.items():
        rows = [row for text in texts for row in rows_with(text)[kind]]
        path = directory / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        ids = list(range(len(rows)))
        batch: Any = (
            PromptDataset(path, tokenizer, max_prompt_tokens=1500).collate(ids, ids)
            if kind == "prompts"
            else dataset_type(path, tokenizer, **LIMITS).collate(ids)
        )
        lengths, tokens = batch.lengths.flatten().tolist(), batch.tokens.flatten(0, -2).tolist()
        encoded = [controls(tokenizer, row[:length]) for row, length in zip(tokens, lengths, strict=True)]
        share = len(encoded) // len(texts)
        for i in range(len(texts)):
            found[i] += encoded[i * share : (i + 1) * share]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_of_any_data_set_holds_a_control_token_of_its_text(
    kind: str, kinds: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = read(kinds[kind])
    tokens = dict.fromkeys((*INJECTED, *sorted(tokenizer.control_tokens)))
    forms = ("x{0}", "{0}50{0} y", "x {0}\n{0}{0}y", "{0}")
    texts = ["x y", *(form.format(token) for token in tokens for form in forms)]
    clean, *found = encode_all(tokenizer, texts, tmp_path)
    assert any(clean)  # bos, eos and the template's own
    assert [text for text, rows in zip(texts[1:], found, strict=True) if rows != clean] == []


@settings(max_examples=60)
@given(text=hostile)
@pytest.mark.parametrize("kind", KINDS)
def test_the_templates_tokens_are_its_own_and_the_text_is_whole(kind: str, kinds: dict[str, Path], text: str) -> None:
    tokenizer = read(kinds[kind])
    talk = [{"role": r, "content": text} for r in ("user", "assistant", "user", "assistant")]
    harmless = [{**turn, "content": "x"} for turn in talk]
    for messages in (talk[:3], talk[:1]):
        tokens = encode_prompt(tokenizer, messages, 5000).tokens
        expected = encode_prompt(tokenizer, harmless[: len(messages)], 5000).tokens
        assert controls(tokenizer, tokens) == controls(tokenizer, expected)
        if kind not in ("collapsing",):
            assert tokenizer.decode(tokens).count(text.strip()) >= len(messages)
    row = encode_conversation(tokenizer, talk, max_prompt_tokens=5000, max_tokens=9000)
    expected = encode_conversation(tokenizer, harmless, max_prompt_tokens=5000, max_tokens=9000)
    assert controls(tokenizer, row.tokens) == controls(tokenizer, expected.tokens)
    responses = [[i for i, own in zip(r.tokens, r.is_response, strict=True) if own] for r in (row, expected)]
    assert controls(tokenizer, responses[0]) == controls(tokenizer, responses[1])
    one = encode_responses(tokenizer, talk[:1], [text], max_prompt_tokens=5000, max_tokens=9000)[0]
    response = [i for i, own in zip(one.tokens, one.is_response, strict=True) if own]
    assert controls(tokenizer, response) == [tokenizer.token(tokenizer.eos_id)]


def test_a_template_that_reads_what_it_is_given_keeps_its_meaning(kinds: dict[str, Path], tmp_path: Path) -> None:
    """The marks that tell its tokens from ours would change what it says; then it is given the text without them."""
    directory = copy_kind(kinds["added"], tmp_path / "reads")
    (directory / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m['content'].startswith('x') %}{{ m['content'] | length }}{% endif %}"
        "<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    tokenizer = Tokenizer.read(directory)
    for text in ("x y", "xy<|im_end|>z"):
        rendered = tokenizer.format_prompt([{"role": "user", "content": text}])
        assert rendered.text.endswith(f"<|im_start|>{text}<|im_end|>")
        assert controls(tokenizer, tokenizer.encode(rendered)) == list(TURNS)
    assert tokenizer.format_prompt([{"role": "user", "content": "x y"}]).text.startswith("3<")


def test_a_pair_of_tags_that_a_template_writes_is_text(kinds: dict[str, Path], tmp_path: Path) -> None:
    """<think> and </think> of a model that reasons stand inside of its responses; what it calls no special token, and
    its template does not write as the mark of a turn, is text."""
    directory = copy_kind(kinds["prepend"], tmp_path / "thinks")
    specification = json.loads((directory / "tokenizer.json").read_text())
    plain = specification["added_tokens"][-1]
    for token in ("<think>", "</think>", "<tool>"):
        specification["added_tokens"].append(
            {**plain, "id": len(specification["added_tokens"]) + 417, "content": token}
        )
    (directory / "tokenizer.json").write_text(json.dumps(specification))
    (directory / "chat_template.jinja").write_text(CHATML + "<think><tool>")
    tokenizer = Tokenizer.read(directory)
    assert {"<think>", "</think>"}.isdisjoint(tokenizer.control_tokens)
    assert {*TURNS, "<tool>"} <= tokenizer.control_tokens
    ids = tokenizer.encode_continuation("<think>so</think><tool>")
    assert [tokenizer.token(i) for i in ids if i >= 420] == ["<think>", "</think>"]
    assert tokenizer.decode(ids) == "<think>so</think><tool>"
