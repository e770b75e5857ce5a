"""One reader of JSON Lines: what a run writes, with any character in it, every command reads back."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_gil.commands.evaluate import read_responses
from megatron_gil.config import ConfigError
from megatron_gil.evaluation.report.runs import read_run
from megatron_gil.jsonl import iter_jsonl
from megatron_gil.training.run.row_file import RowFile, keep_iterations_below

# Every character at which str.splitlines() cuts.
ENDS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
texts = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(ENDS), max_size=20)


@given(responses=st.lists(texts, max_size=6))
def test_what_a_run_writes_comes_back(tmp_path_factory: pytest.TempPathFactory, responses: list[str]) -> None:
    run = tmp_path_factory.mktemp("run")
    (run / "metrics.jsonl").write_text('{"iteration": 0}\n')
    rows = [{"iteration": i, "prompt": text, "response": text} for i, text in enumerate(responses)]
    file = RowFile(run / "samples.jsonl")
    file.add(rows)
    assert file.write() == ""
    assert [row for _, row in iter_jsonl(run / "samples.jsonl")] == rows
    assert read_run(run).samples == rows
    if rows:
        assert read_responses(run / "samples.jsonl") == rows
    keep_iterations_below(run / "samples.jsonl", 3)
    assert [row for _, row in iter_jsonl(run / "samples.jsonl")] == rows[:3]


def test_a_byte_order_mark_and_blank_lines_are_passed_over_everywhere(tmp_path: Path) -> None:
    rows = [{"iteration": i, "prompt": "a", "response": "b\u2028"} for i in range(3)]
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    content = b"\xef\xbb\xbf" + lines[0] + b"\r\n\n \t\n\xef\xbb\xbf\n\xef\xbb\xbf" + lines[1] + b"\n\n" + lines[2]
    (tmp_path / "samples.jsonl").write_bytes(content)
    numbers = re.sub(rb', "prompt.*?}', b"}", content)
    (tmp_path / "metrics.jsonl").write_bytes(numbers)
    (tmp_path / "samples.jsonl.gz").write_bytes(gzip.compress(content))
    assert list(iter_jsonl(tmp_path / "samples.jsonl.gz")) == [(1, rows[0]), (5, rows[1]), (7, rows[2])]
    assert read_responses(tmp_path / "samples.jsonl") == read_run(tmp_path).samples == rows
    assert read_run(tmp_path).metrics == [{"iteration": i} for i in range(3)]
    keep_iterations_below(tmp_path / "samples.jsonl", 9)
    assert read_responses(tmp_path / "samples.jsonl") == rows


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_line_cut_short_by_a_crash_is_left_out_and_a_damaged_one_named(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "samples.jsonl"
    whole = '{"iteration": 0, "text": "字\u2028字\U0001f642"}\n'.encode()
    path.write_bytes(whole + whole[:-cut])
    expected = 2 if cut == 1 else 1  # the line end alone is missing
    assert len(list(iter_jsonl(path, growing=True))) == expected
    keep_iterations_below(path, 1)
    assert path.read_bytes() == whole * expected
    path.write_bytes(whole + whole[:-cut][:-1] + b"\n" + whole)
    with pytest.raises(ConfigError, match=r"samples\.jsonl:2: not "):
        keep_iterations_below(path, 1)
    assert path.read_bytes().count(whole) == 2  # nothing was deleted


@pytest.mark.parametrize("row", ["3", "[]", '{"loss": 1.0}', '{"iteration": "1"}'])
def test_a_row_that_is_not_a_runs_own_is_named(tmp_path: Path, row: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"iteration": 0}}\n{row}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl:2: "):
        keep_iterations_below(path, 1)
