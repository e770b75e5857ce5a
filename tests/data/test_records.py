from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_gil.config import ConfigError
from megatron_gil.data.rows.fields import COLUMNS, check_record
from megatron_gil.data.rows.records import read_records
from megatron_gil.jsonl import LONGEST_ROW, iter_jsonl

KINDS = ("prompts", "demonstrations", "responses", "preferences", "texts")
TURN = {"role": "user", "content": "q"}
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*COLUMNS, "response", "role"]), inner),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("kind", "row", "complaint"),
    [
        ("prompts", {"prompt": 3}, "field prompt must be text, found the number 3"),
        ("prompts", {"prompt": " \n"}, "field prompt is empty"),
        ("prompts", {"question": "a"}, "field prompt is missing"),
        ("prompts", {"prompt": None}, "field prompt is missing"),
        ("prompts", ["a"], "a row is an object"),
        ("prompts", {"prompt": "a", "group": 1.5}, "field group must be text or an integer, found the number 1.5"),
        ("prompts", {"prompt": "a", "group": True}, "field group must be text or an integer, found true or false"),
        ("prompts", {"prompt": "a\ud800"}, "field prompt holds half of a surrogate pair"),
        ("prompts", {"messages": []}, "field messages must be a list of turns"),
        ("demonstrations", {"prompt": "a", "completion": ""}, "field completion is empty"),
        ("demonstrations", {"prompt": "a"}, "field completion is missing"),
        ("demonstrations", {"messages": [TURN]}, "field messages: the last turn must be the assistant's"),
        ("demonstrations", {"messages": [TURN, {"role": "bot", "content": "x"}]}, r"messages\[1\].role must be one of"),
        ("demonstrations", {"messages": [TURN, {"role": "assistant"}]}, r"messages\[1\].content is missing"),
        ("demonstrations", {"messages": [TURN, "hello"]}, r"field messages\[1\] must be"),
        ("responses", {"prompt": "a", "response": ["b"]}, "field response must be text, found a list"),
        ("preferences", {"prompt": "a", "chosen": "b"}, "field rejected is missing"),
        ("preferences", {"prompt": "a", "chosen": "b", "rejected": {}}, "field rejected must be text, found an object"),
        ("texts", {"text": ""}, "field text is empty"),
    ],
)
def test_a_bad_row_names_file_line_and_field(write_rows: Callable[..., Path], kind: str, row: Any, complaint: str):
    good = {"prompt": "a", "completion": "b", "response": "", "chosen": "b", "rejected": "c", "text": "t", "group": 1}
    path = write_rows([good, row])
    with pytest.raises(ConfigError, match=complaint) as error:
        read_records(path, kind)
    assert str(error.value).startswith(f"{path}:2: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"prompt": "a"', ":3: not valid JSON: Expecting ',' delimiter at column 15"),
        (b'{"prompt": "\xff"}', ":3: not UTF-8 at byte 13 of the line"),
        (b"[" * 100_000, ":3: JSON nested too deeply"),
        (b"9" * 5000, ":3: not valid JSON: Exceeds the limit"),
    ],
)
def test_a_line_that_is_no_json_is_named(tmp_path: Path, line: bytes, complaint: str):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n\n' + line)  # the blank line is skipped but counted
    with pytest.raises(ConfigError) as error:
        read_records(path, "prompts")
    assert complaint in str(error.value)


@given(content=st.binary(max_size=80) | json_values.map(lambda v: json.dumps(v).encode()))
def test_any_bytes_are_rows_or_one_complaint(tmp_path_factory: pytest.TempPathFactory, content: bytes):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(content)
    for kind in KINDS:
        complaint = ""
        try:
            for number, record in iter_jsonl(path):
                row = check_record(record, kind, f"{path}:{number}")
                assert row.keys() == set(COLUMNS)
                json.dumps(row, ensure_ascii=False).encode("utf-8")
        except ConfigError as error:
            complaint = str(error)
        assert "\n" not in complaint


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("none.jsonl", None, "no such file"),
        ("rows.jsonl", b"", "no rows"),
        ("rows.jsonl", b"\n\n", "no rows"),
        ("rows.txt", b"{}", "must end in .jsonl"),
        ("rows.jsonl.gz", b'{"prompt": "a"}', "cannot be read: Not a gzipped file"),
        ("rows.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 99, mtime=0)[:-12], "cannot be read"),
        ("rows.parquet", b"PAR1", "cannot be read as Parquet"),
        ("directory/readme.md", b"", "holds no file that ends in"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes | None, complaint: str):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if content is not None:
        path.write_bytes(content)
    given = path.parent if name.startswith("directory") else path
    with pytest.raises(ConfigError, match=complaint) as error:
        read_records(given, "prompts")
    assert str(given) in str(error.value)


def test_json_lines_gzip_and_parquet_give_the_same_rows(write_rows: Callable[..., Path], tmp_path: Path):
    import pandas

    rows = [
        {"messages": [TURN, {"role": "assistant", "content": "a\u2028b\nc"}], "group": 3, "extra": [1, "x"]},
        {"prompt": "\n\nHuman: é字\n\nAssistant:", "completion": " 🙂", "group": "x", "extra": {"other": None}},
        {"prompt": "p", "completion": "c"},
    ]
    parquet = tmp_path / "rows.parquet"
    pandas.DataFrame([{**row, "extra": 1, "group": str(row.get("group", ""))} for row in rows]).replace(
        {"group": {"": None}}
    ).to_parquet(parquet)
    expected = [
        dict.fromkeys(COLUMNS) | {"messages": rows[0]["messages"], "group": "3"},
        dict.fromkeys(COLUMNS) | {"prompt": rows[1]["prompt"], "completion": " 🙂", "group": "x"},
        dict.fromkeys(COLUMNS) | {"prompt": "p", "completion": "c"},
    ]
    for path in (write_rows(rows), write_rows(rows, "rows.jsonl.gz"), parquet):
        assert read_records(path, "demonstrations").to_list() == expected


def test_rows_are_memory_mapped_and_checked_once_until_the_file_changes(write_rows: Callable[..., Path]):
    path = write_rows([{"prompt": "one"}])
    first = read_records(path, "prompts")
    mapped = first.cache_files[0]["filename"]
    written = os.stat(mapped).st_mtime_ns
    again = read_records(path, "prompts")
    assert again.cache_files[0]["filename"] == mapped
    assert os.stat(mapped).st_mtime_ns == written
    path.write_text('{"prompt": "two"}\n')
    assert read_records(path, "prompts")["prompt"][:] == ["two"]


def test_a_directory_is_read_in_the_order_of_names_or_for_its_kind_alone(write_rows: Callable[..., Path]):
    path = write_rows([{"prompt": "second"}], "all/b.jsonl")
    write_rows([{"prompt": "first"}], "all/a.jsonl.gz")
    assert read_records(path.parent, "prompts")["prompt"][:] == ["first", "second"]
    path = write_rows([{"prompt": "only"}], "prepared/prompts.jsonl")
    write_rows([{"prompt": "p", "chosen": "a", "rejected": "b"}], "prepared/preferences.jsonl")
    assert read_records(path.parent, "prompts")["prompt"][:] == ["only"]


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n')
    assert read_records(path, "prompts")["prompt"][:] == ["a", "b"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_row_has_a_greatest_length(name: str, tmp_path: Path) -> None:
    path, long = tmp_path / name, json.dumps({"prompt": "x" * LONGEST_ROW})
    with gzip.open(path, "wt") if name.endswith(".gz") else path.open("w") as file:
        file.write('{"prompt": "a"}\n' + long + "\n")
    with pytest.raises(ConfigError, match=r"rows\.jsonl(\.gz)?:2: a row of more than 8 MiB; cut it into several"):
        list(iter_jsonl(path))
    longest = json.dumps({"prompt": "x" * (LONGEST_ROW - 16)})
    path = tmp_path / "fits.jsonl"
    path.write_text(longest + "\n")
    assert [number for number, _ in iter_jsonl(path)] == [1]
    with pytest.raises(ConfigError, match="field prompt has 8388609 characters, more than 8388608"):  # out of Parquet
        check_record({"prompt": "x" * (LONGEST_ROW + 1)}, "prompts", "rows.parquet:1")


def test_a_pattern_reads_the_files_that_fit_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("part-1", "part-0", "other"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name}) + "\n")
    assert read_records(tmp_path / "part-*.jsonl", "prompts")["prompt"] == ["part-0", "part-1"]
    with pytest.raises(ConfigError, match=r"shard-\*\.jsonl: no such file or directory"):
        read_records(tmp_path / "shard-*.jsonl", "prompts")
    (tmp_path / "part-2.txt").touch()
    with pytest.raises(ConfigError, match=r"part-2\.txt: must end in \.jsonl"):
        read_records(tmp_path / "part-*", "prompts")


def test_other_fields_travel_where_they_are_asked_for(write_rows: Callable[..., Path], tmp_path: Path):
    """As JSON, of both file forms; without asking, the rows and their checked copy are those of before."""
    pandas = pytest.importorskip("pandas")
    rows = [
        {"prompt": "a", "answer": "é\u2028", "group": 3, "response": "mine", "nested": {"x": [1, None]}},
        {"prompt": "b", "completion": "c", "level": 1.5, "none": None},
    ]
    read = read_records(write_rows(rows), "prompts", others=True)
    assert [json.loads(text) for text in read["others"]] == [
        {"answer": "é\u2028", "group": 3, "response": "mine", "nested": {"x": [1, None]}},
        {"completion": "c", "level": 1.5},
    ]
    assert read.remove_columns("others").to_list() == read_records(write_rows(rows), "prompts").to_list()
    pair = {"prompt": "p", "chosen": "c", "rejected": "r", "source": "s"}
    assert read_records(write_rows([pair]), "preferences", others=True)["others"][:] == ['{"source": "s"}']
    parquet = tmp_path / "rows.parquet"
    pandas.DataFrame([{"prompt": "p", "day": pandas.Timestamp("2026-11-01"), "empty": None}]).to_parquet(parquet)
    assert json.loads(read_records(parquet, "prompts", others=True)["others"][0]) == {"day": "2026-11-01 00:00:00"}


def test_another_field_that_is_no_text_is_refused(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "good": "x", "bad": ["\\ud800"]}\n')
    assert len(read_records(path, "prompts")) == 1
    with pytest.raises(ConfigError) as refused:
        read_records(path, "prompts", others=True)
    assert str(refused.value) == f"{path}:1: field 'bad' holds half of a surrogate pair, which is no character"
