from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_gil.config import ConfigError
from megatron_gil.data.prepare.sources import SOURCES, guess_reader
from megatron_gil.data.prepare.sources.example import Example, Origin, Tally
from megatron_gil.data.prepare.sources.files import HubChoice, iter_native_rows, stream_hub
from megatron_gil.data.text.chat import Message

HI = "\n\nHuman: hi\n\nAssistant:"
CUT_END = "question without a response cut from the end"
CUT_START = "response without a question cut from the start"
FIELDS = [
    *("prompt", "completion", "chosen", "rejected", "messages", "conversations", "from", "value", "role", "content"),
    *("query", "reference_responses", "postprocessed_response", "preferred", "label", "summaries", "choice", "info"),
    *("text", "subreddit", "title", "post", "article", "highlights", "response_0", "response_1", "group"),
    *("safer_response_id", "better_response_id", "is_response_0_safe"),
]
words = st.sampled_from(["hi", "", " ", HI, HI + " a", "human", "gpt", "user", "assistant", "system", "ours", "\ud800"])
values = st.recursive(
    words | st.none() | st.booleans() | st.integers(-1, 2) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=5),
    max_leaves=12,
)


def read_all(source: str, rows: Iterable[Any], **origin: str) -> tuple[list[Example], Tally]:
    tally = Tally()
    read = (SOURCES[source](row, Origin(**{"name": "file", **origin}), tally) for row in rows)
    return [example for example in read if example is not None], tally


def read_one(source: str, row: Any, **origin: str) -> tuple[Example | None, dict[Any, int]]:
    examples, tally = read_all(source, [row], **origin)
    return (examples[0] if examples else None), {**tally.dropped, **tally.noted}


def turns(*said: str, first: str = "human") -> list[dict[str, str]]:
    speakers = ("human", "gpt") if first == "human" else ("gpt", "human")
    return [{"from": speakers[i % 2], "value": text} for i, text in enumerate(said)]


def messages(*said: str) -> list[Message]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


def test_tools_beside_the_turns_are_counted():
    rows = [
        {"conversations": turns("What time is it?", "I cannot tell."), "tools": '[{"name": "clock"}]'},
        {"conversations": turns("hi", "hello"), "tools": "[]", "system": ""},
        {"messages": messages("hi", "hello"), "tools": [{"name": "clock"}], "system": "Be kind."},
    ]
    examples, tally = read_all("sharegpt", rows)
    assert len(examples) == 3
    assert tally.noted == {"field tools left out": 2, "field system left out": 1}


def test_hh_pair_becomes_prompt_and_two_responses():
    example, counts = read_one("hh", {"chosen": HI + " yes", "rejected": HI + " no"}, name="x/harmless-base/a.gz")
    assert example == Example(prompt=HI, completion=" yes", chosen=" yes", rejected=" no", group="harmless")
    assert counts == {}


@pytest.mark.parametrize(
    ("chosen", "rejected", "kept", "counted"),
    [
        (HI + " a", HI + " a", ("completion",), {("preferences", "both responses are equal"): 1}),
        (HI + " a", HI + " ", ("completion",), {("preferences", "a response is empty"): 1}),
        (
            HI + " ",
            HI + " a",
            (),
            {("preferences", "a response is empty"): 1, ("demonstrations", "the response is empty"): 1},
        ),
        (HI + " a", "\n\nHuman: ho\n\nAssistant: b", ("completion",), {("preferences", "the two prompts differ"): 1}),
        (HI + "a  ", HI + "  b", ("completion", "chosen"), {"spaces around a response made one before it": 2}),
    ],
)
def test_hh_oddities_cost_only_what_they_spoil(chosen: str, rejected: str, kept: tuple[str, ...], counted: dict):
    example, counts = read_one("hh", {"chosen": chosen, "rejected": rejected})
    assert example is not None
    assert {name for name in ("completion", "chosen") if getattr(example, name) is not None} == set(kept)
    assert counts == counted


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": "hello", "rejected": HI}, "not a Human/Assistant conversation"),
        ({"chosen": HI[2:].replace("Assistant", "Other"), "rejected": HI}, "not a Human/Assistant conversation"),
        ({"chosen": HI}, "no text under chosen and rejected"),
        ({"chosen": [HI], "rejected": HI}, "no text under chosen and rejected"),
    ],
)
def test_hh_rows_that_are_none_are_left_out(row: dict[str, Any], reason: str):
    assert read_one("hh", row) == (None, {("rows", reason): 1})


def test_hh_two_turns_in_a_row_are_left_out_of_everything():
    twice = HI + " a\n\nAssistant:"
    example, counts = read_one("hh", {"chosen": twice + " b", "rejected": twice + " c"})
    assert example is None
    reason = "two turns in a row by one speaker"
    assert counts == {(kind, reason): 1 for kind in ("prompts", "demonstrations", "preferences")}


@pytest.mark.parametrize(
    ("name", "rows", "oddities"),
    [
        ("helpful", 2354, {"both responses are equal": 2, "the two prompts differ": 9, "a response is empty": 4}),
        ("harmless", 2312, {"the two prompts differ": 5, "a response is empty": 4}),
    ],
)
def test_hh_files_hold_the_oddities_they_are_known_for(real_data: Path, name: str, rows: int, oddities: dict[str, int]):
    path = real_data / "hh" / f"{name}-base-test.jsonl.gz"
    native = [row for _, row in iter_native_rows(str(path), HubChoice())]
    examples, tally = read_all("hh", native, name=str(path))
    assert len(native) == rows
    for reason, count in oddities.items():
        assert tally.dropped["preferences", reason] == count
    doubled = {"helpful": 9, "harmless": 8}[name]
    assert tally.dropped["demonstrations", "two turns in a row by one speaker"] == doubled
    assert len(examples) == rows - doubled
    num_pairs = sum(example.chosen is not None for example in examples)
    assert num_pairs == rows - sum(count for (kind, _), count in tally.dropped.items() if kind == "preferences")
    assert {example.group for example in examples} == {name}


def test_tldr_judged_summaries_follow_the_verdict(real_data: Path):
    path = real_data / "tldr" / "oai1b_judged.csv"
    native = [row for _, row in iter_native_rows(str(path), HubChoice())]
    assert len(native) == 1945
    assert sum("\n" in row["query"] for row in native) == 1945  # quoted newlines
    examples, tally = read_all("tldr", native)
    assert tally.dropped == {("preferences", "no verdict on two summaries"): 945}
    for row, example in zip(native, examples, strict=True):
        assert example.prompt == row["query"]
        assert example.completion == " " + row["reference_responses"].strip()
        better = {"ours": "postprocessed_response", "reference": "reference_responses", "": None}[row["preferred"]]
        assert example.chosen == (better and " " + row[better].strip())
    assert examples[0].group == "AskReddit"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "P\nTL;DR:", "label": "s"}, Example(prompt="P\nTL;DR:", completion=" s")),
        ({"prompt": "P", "completion": " s"}, Example(prompt="P\n\nTL;DR:", completion=" s")),
        (
            {"prompt": "P\n\nTL;DR:", "chosen": "TL;DR: a", "rejected": "TL;DR: b"},
            Example(prompt="P\n\nTL;DR:", completion=" a", chosen=" a", rejected=" b"),
        ),
        (
            {"subreddit": "cats", "title": "T", "post": "P", "summary": "s"},
            Example(prompt="SUBREDDIT: r/cats\n\nTITLE: T\n\nPOST: P\n\nTL;DR:", completion=" s", group="cats"),
        ),
        (
            {
                "info": {"subreddit": "cats", "title": "T", "post": "P"},
                "summaries": [{"text": " a"}, {"text": " b"}],
                "choice": 1,
            },
            Example(
                prompt="SUBREDDIT: r/cats\n\nTITLE: T\n\nPOST: P\n\nTL;DR:",
                completion=" b",
                chosen=" b",
                rejected=" a",
                group="cats",
            ),
        ),
    ],
)
def test_tldr_is_read_in_the_forms_it_is_passed_around_in(row: dict[str, Any], expected: Example):
    assert read_one("tldr", row)[0] == expected


def test_cnndm_highlights_become_one_paragraph(real_data: Path):
    native = [row for _, row in iter_native_rows(str(real_data / "cnndm"), HubChoice())]
    examples, tally = read_all("cnndm", native)
    assert len(examples) == 500
    assert tally.noted == {"highlights on several lines joined to one paragraph": 494}
    for row, example in zip(native, examples, strict=True):
        assert example.prompt == f"Article: {row['article'].strip()}\n\nTL;DR:"
        assert example.completion == " " + " ".join(row["highlights"].split())


@pytest.mark.parametrize("label", ["safer", "better"])
def test_safe_rlhf_follows_the_verdict_asked_for(real_data: Path, label: str):
    native = [row for _, row in iter_native_rows(str(real_data / "pku"), HubChoice())]
    examples, tally = read_all("safe-rlhf", native, safe_rlhf_label=label)
    assert tally.noted["the better response is not the safer one"] == 19
    for row, example in zip(native, examples, strict=True):
        preferred = row[f"{label}_response_id"]
        assert example.prompt == f"\n\nHuman: {row['prompt'].strip()}\n\nAssistant:"
        assert example.chosen == " " + row[f"response_{preferred}"].strip()
        assert example.rejected == " " + row[f"response_{1 - preferred}"].strip()
        assert (example.completion is not None) == row[f"is_response_{preferred}_safe"]


def test_sharegpt_files_are_read_whole(real_data: Path):
    native = [row for _, row in iter_native_rows(str(real_data / "sharegpt"), HubChoice())]
    assert len(native) == 800  # one file's top level is an object
    examples, tally = read_all("sharegpt", native)
    assert len(examples) == 800
    assert tally.noted == {"system turn kept": 80}
    assert sum(example.chosen is not None for example in examples) == 299
    for row, example in zip(native, examples, strict=True):
        said = [turn["value"].strip() for turn in row["conversations"]]
        said += [row["chosen"]["value"].strip()] if "chosen" in row else []
        assert example.messages is not None
        assert [message["content"] for message in example.messages] == said


@pytest.mark.parametrize(
    ("conversation", "said", "counted"),
    [
        (turns("a", "b"), ["a", "b"], {}),
        (turns("a", "b", "c"), ["a", "b"], {CUT_END: 1}),
        (turns("x", "a", "b", first="gpt"), ["a", "b"], {CUT_START: 1}),
        ([*turns("a"), *turns("b", "c")], ["a\n\nb", "c"], {"turns in a row by one speaker merged": 1}),
        ([{"from": "system", "value": "s"}, *turns("a", "b")], ["s", "a", "b"], {"system turn kept": 1}),
        (
            [*turns("a", "b"), {"from": "system", "value": "s"}],
            None,
            {("rows", "a system turn after the first turn"): 1},
        ),
        (turns("a", " "), None, {("rows", "an empty turn"): 1}),
        (turns("a"), None, {CUT_END: 1, ("rows", "no question with a response"): 1}),
        (turns("x", first="gpt"), None, {CUT_START: 1, ("rows", "no question"): 1}),
        ([], None, {("rows", "no list of turns"): 1}),
        ("a", None, {("rows", "no list of turns"): 1}),
        ([{"from": "tool", "value": "x"}], None, {("rows", "a turn by an unknown speaker, or without text"): 1}),
        ([{"from": "gpt", "value": 3}], None, {("rows", "a turn by an unknown speaker, or without text"): 1}),
    ],
)
def test_sharegpt_oddities_are_repaired_or_left_out(conversation: Any, said: list[str] | None, counted: dict):
    example, counts = read_one("sharegpt", {"conversations": conversation})
    counts.pop(("preferences", "no second response to compare"), None)
    assert (None if example is None else [message["content"] for message in example.messages or []]) == said
    assert counts == counted


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "completion": "c"}, Example(prompt="p", completion="c")),
        ({"prompt": "p", "group": 3}, Example(prompt="p", group="3")),
        ({"prompt": "p", "chosen": " a", "rejected": "b"}, Example(prompt="p", chosen=" a", rejected="b")),
        ({"chosen": HI + " a", "rejected": HI + " b"}, Example(prompt=HI, completion=" a", chosen=" a", rejected=" b")),
        ({"prompt": messages("hi")}, Example(prompt=HI)),
        (
            {"prompt": messages("hi"), "completion": messages("hi", "a")[1:]},
            Example(prompt=HI, completion=" a", messages=messages("hi", "a")),
        ),
        (
            {"prompt": messages("hi"), "completion": "a"},
            Example(prompt=HI, completion=" a", messages=messages("hi", "a")),
        ),
        (
            {"prompt": "hi", "chosen": messages("hi", "a"), "rejected": messages("hi", "b")},
            Example(prompt=HI, completion=" a", chosen=" a", rejected=" b", messages=messages("hi", "a")),
        ),
        ({"messages": messages("hi", "a")}, Example(prompt=HI, completion=" a", messages=messages("hi", "a"))),
    ],
)
def test_rows_that_have_our_names_or_trls(row: dict[str, Any], expected: Example):
    assert read_one("jsonl", row)[0] == expected


@given(row=st.dictionaries(st.sampled_from(FIELDS), values))
def test_no_reader_stumbles_over_any_row(row: dict[str, Any]):
    for source in SOURCES:
        for label in ("safer", "better"):
            examples, tally = read_all(source, [row], safe_rlhf_label=label)
            assert examples or tally.dropped
            for example in examples:
                assert example.prompt.strip()
                assert (example.chosen is None) == (example.rejected is None)
                assert example.completion is None or example.completion.strip()
    guess_reader(row)(row, Origin(name="x"), Tally())


def test_readers_are_guessed_from_what_only_they_have(real_data: Path):
    for source, directory in {"tldr": "tldr", "sharegpt": "sharegpt", "safe-rlhf": "pku", "cnndm": "cnndm"}.items():
        for _, row in iter_native_rows(str(real_data / directory), HubChoice()):
            assert guess_reader(row) is SOURCES[source]


def test_every_file_form_gives_the_same_rows(write_rows: Callable[..., Path], tmp_path: Path):
    import pandas

    rows = [{"prompt": 'a\n"b", c', "completion": "x" * 200_000}, {"prompt": "é\u2028", "completion": "NA"}]
    lines = write_rows(rows)
    (tmp_path / "misnamed.json").write_bytes(lines.read_bytes())
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "list.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    (tmp_path / "wrapped.json").write_text(json.dumps({"data": rows}))
    pandas.DataFrame(rows).to_csv(tmp_path / "table.csv", index=False)
    pandas.DataFrame(rows).to_csv(tmp_path / "table.csv.gz", index=False)
    pandas.DataFrame(rows).to_parquet(tmp_path / "table.parquet")
    write_rows(rows, "rows.jsonl.gz")
    for path in (file for file in sorted(tmp_path.iterdir())):
        assert [row for _, row in iter_native_rows(str(path), HubChoice())] == rows, path.name
    assert len(list(iter_native_rows(str(tmp_path), HubChoice()))) == 2 * 9


def test_what_the_hub_would_stream_is_read_through_datasets(write_rows: Callable[..., Path]):
    """The hub itself needs a network; a directory goes through the same call."""
    rows = [{"chosen": HI + " a", "rejected": HI + " b"}] * 3
    path = write_rows(rows, "repository/train.jsonl")
    assert list(stream_hub(str(path.parent), HubChoice())) == rows
    with pytest.raises(ConfigError, match="no such file here"):
        list(stream_hub(str(path.parent), HubChoice(split="nonsense")))


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("rows.json", b'{"a": ', "not valid JSON"),
        ("rows.json", b"\xff", "cannot be read"),
        ("rows.json", b"[" * 100_000, "cannot be read"),
        ("rows.json", b'{"a": 1}\n{"a": ', ":2: not valid JSON"),
        ("rows.json.gz", b"{}", "cannot be read"),
        ("rows.csv", b"", "cannot be read as CSV"),
        ("rows.csv", b"a,b\n1,2,3,4\n1,2,3\n1,2,3,4,5,6\n", "cannot be read as CSV"),
        ("rows.csv", b"a\n\xff\n", "cannot be read as CSV"),
        ("rows.parquet", b"", "cannot be read as Parquet"),
        ("rows.pdf", b"", "must end in"),
        ("missing.jsonl", None, "no such file"),
        ("empty/readme", b"", "holds no file"),
    ],
)
def test_an_unreadable_input_is_one_line(tmp_path: Path, name: str, content: bytes | None, complaint: str):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=complaint) as error:
        list(iter_native_rows(str(path.parent if name == "empty/readme" else path), HubChoice()))
    assert "\n" not in str(error.value)
