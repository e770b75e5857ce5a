"""The command `evaluate-reward` on files of scored pairs: files in, table and files out."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_gil.cli import main
from tests.world import write_rows


def make_row(margin: float, place: int = 0, **more: Any) -> dict[str, Any]:
    texts = {"prompt": f"prompt {place}", "chosen": f"yes {place}", "rejected": "no"}
    return {**texts, "score_chosen": 1 + margin, "score_rejected": 1.0, **more}


def run(*arguments: object) -> int:
    return main(["evaluate-reward", *map(str, arguments)])


def test_numbers_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    helpful = write_rows(tmp_path / "helpful.scored.jsonl", [make_row(0.5 - i % 4, i, group=i % 2) for i in range(40)])
    harmless = tmp_path / "harmless.jsonl.gz"
    with gzip.open(harmless, "wt") as file:
        file.writelines(json.dumps(make_row(2.0, i, group="[/b]|x")) + "\n" for i in range(60))
    output = tmp_path / "new" / "quality.json"
    assert run(helpful, harmless, "--output", output) == 0
    said = capsys.readouterr()
    found = json.loads(output.read_text())
    assert found["sources"] == ["helpful", "harmless"]
    assert found["overall"]["accuracy"]["value"] == 0.7
    assert {name: part["accuracy"]["value"] for name, part in found["slices"]["file"].items()} == {
        "helpful": 0.25,
        "harmless": 1.0,
    }
    assert {name: part["num_pairs"] for name, part in found["slices"]["group"].items()} == {
        "0": 20,
        "1": 20,
        "[/b]|x": 60,
    }
    assert "70.0 [" in said.out
    assert "[/b]|x" in said.out
    assert f"written: {output.with_suffix('.md')}, {output.with_suffix('.svg')}, {output}" in said.err
    table = output.with_suffix(".md").read_text()
    assert "| [/b]\\|x | 60 | 100.0 [" in table
    assert "](quality.svg)" in table
    assert output.with_suffix(".svg").read_text().startswith("<?xml")
    assert len(list(output.parent.iterdir())) == 3


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    scored = write_rows(tmp_path / "a.jsonl", [make_row((-1) ** i * i, i // 2) for i in range(1, 60)])
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        assert run(scored, "--output", tmp_path / name / "q.json") == 0
    for ending in ("json", "md", "svg"):
        assert (tmp_path / "one" / f"q.{ending}").read_bytes() == (tmp_path / "two" / f"q.{ending}").read_bytes()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (make_row(0, score_chosen=float("nan")), "score_chosen is nan, which no score can be"),
        (make_row(0, score_rejected=1e39), "score_rejected is 1e+39, which no score can be"),
        (make_row(0, score_chosen=True), 'no number "score_chosen"'),
        ({"prompt": "p", "response": "r", "score": 1.0}, "one scored response, not a pair"),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b"},
            'no number "score_chosen"; write one with `megatron-gil score`',
        ),
        (make_row(0, rejected=None), 'no text "rejected"'),
        (make_row(0, group=[1]), '"group" must be text or an integer'),
        ([1], "not an object"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], row: Any, expected: str) -> None:
    scored = write_rows(tmp_path / "a.jsonl", [make_row(1.0), row])
    assert run(scored) == 2
    said = capsys.readouterr()
    assert f"megatron-gil evaluate-reward: {scored}:2: {expected}" in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_what_does_not_go_together_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scored = write_rows(tmp_path / "a.jsonl", [make_row(1.0)])
    empty = write_rows(tmp_path / "empty.jsonl", [])
    cases: list[tuple[list[object], str]] = [
        ([scored, "--dry-run"], "no settings and no --dry-run"),
        ([scored, "output=q.json"], "no settings and no --dry-run"),
        ([scored, scored], "is given twice"),
        ([scored, empty], f"{empty}: holds no pairs"),
        ([tmp_path / "none.jsonl"], "none.jsonl: cannot be read"),
        ([scored, "--output", tmp_path / "q.txt"], "must end in .json"),
        ([scored, "--output", scored / "q.json"], "cannot be written: Not a directory"),
        ([], "output is not set"),
    ]
    for arguments, expected in cases:
        assert run(*arguments) == 2, arguments
        said = capsys.readouterr().err
        assert expected in said
        assert said.count("\n") == 1, said
    (tmp_path / "q.svg").write_text("mine")
    assert run(scored, "--output", tmp_path / "q.json") == 2
    assert "q.svg exists already" in capsys.readouterr().err
    assert (tmp_path / "q.svg").read_text() == "mine"


def test_files_of_one_name_are_told_apart_by_their_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        paths.append(write_rows(tmp_path / name / "a.jsonl", [make_row(1.0)]))
    assert run(*paths, "--output", tmp_path / "q.json") == 0
    assert json.loads((tmp_path / "q.json").read_text())["sources"] == [str(path) for path in paths]


def test_files_need_no_torch(tmp_path: Path) -> None:
    scored = write_rows(tmp_path / "a.jsonl", [make_row(1.0)])
    code = (
        "import sys; from megatron_gil.cli import main; "
        f"code = main(['evaluate-reward', {str(scored)!r}]); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
