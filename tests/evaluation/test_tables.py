"""The tables of several judges, tasks and opponents, and the command that makes them of files."""

import csv
import io
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from megatron_gil.commands.win_rates import print_table, win_rates
from megatron_gil.config import ConfigError
from megatron_gil.evaluation.comparisons import Judgment, judgment_rows, read_judgments
from megatron_gil.evaluation.judge import Verdict
from megatron_gil.evaluation.report.page import Table
from megatron_gil.evaluation.tables import as_csv, as_json, as_markdown, console_tables, summarise, text_tables
from megatron_gil.paths import write_new
from tests.evaluation.judged import judged


def _evaluations() -> list[Judgment]:
    """Two judges, two tasks, two opponents; the first judge in both orders, and a refusal."""
    rng = random.Random(0)
    verdicts: tuple[Verdict, ...] = ("win", "tie", "lose")
    rows = []
    for judge in ("model|1", "people"):
        for task in ("helpful", "harmless"):
            for opponent in ("dpo", "sft"):
                for i in range(30):
                    first, second = rng.choices(verdicts, k=2)
                    outcome = first if first == second else "tie"
                    row = judged(outcome, f"{task}{i}", judge=judge, task=task, opponent=opponent)
                    rows.append(replace(row, ours_first=first, theirs_first=second) if judge == "model|1" else row)
    return [*rows, judged("refused", "x", judge="model|1", task="helpful", opponent="dpo")]


def _write(path: Path, rows: list[Judgment]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in judgment_rows(rows)))
    return path


def test_cells_stand_for_judge_task_and_opponent() -> None:
    summary = summarise(_evaluations())
    assert len(summary.cells) == 8
    assert sum(cell.rate.refused for cell in summary.cells) == 1
    assert [cell.position is not None for cell in summary.cells] == [True] * 4 + [False] * 4
    (pair,) = summary.pairs
    assert (pair.first, pair.second) == ("model|1", "people")
    wins, position, length, agreement = text_tables(summary)
    assert wins.header[:3] == ("judge", "task", "opponent")
    assert wins.header[-1] == "refused"
    assert wins.caption == "win / tie / lose of us"
    assert [len(t.rows) for t in (wins, position, length, agreement)] == [8, 4, 8, 1]
    assert all(len(row) == len(t.header) for t in (wins, position, length, agreement) for row in t.rows)


def test_console_tables_are_narrow() -> None:
    shown = console_tables(summarise(_evaluations()))
    assert [table.caption for table in shown] == [
        "win / tie / lose of us on helpful by model|1",
        "win / tie / lose of us on harmless by model|1",
        "win / tie / lose of us on helpful by people",
        "win / tie / lose of us on harmless by people",
        "agreement",
    ]
    assert [bool(table.note) for table in shown] == [False, False, False, True, True]


def test_files_say_the_same() -> None:
    summary = summarise(_evaluations())
    content = as_json(summary)
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    lines = list(csv.DictReader(io.StringIO(as_csv(summary))))
    for cell, line in zip(summary.cells, lines, strict=True):
        assert (line["judge"], line["task"], line["opponent"]) == (cell.judge, cell.task, cell.opponent)
        assert float(line["margin_low"]) == cell.rate.margin.low
        assert line["position_first"] == ("" if cell.position is None else str(cell.position.first.value))
    table = next(t for t in content["tables"] if (t["judge"], t["task"]) == ("people", "harmless"))
    assert table["opponents"]["sft"]["margin"]["value"] == summary.cells[-1].rate.margin.value
    markdown = as_markdown(summary, "all.svg")
    assert "![win / tie / lose](all.svg)" in markdown
    assert "| model\\|1 | helpful | dpo | 30 |" in markdown


def test_nothing_judged_is_null_and_not_nan() -> None:
    summary = summarise([judged("unanswered")])
    assert as_json(summary)["tables"][0]["opponents"]["o"]["win"]["value"] is None
    json.dumps(as_json(summary), allow_nan=False)
    assert text_tables(summary)[0].rows[0][1:6] == ("0", "-", "-", "-", "-")


def test_win_rates_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = _evaluations()
    files = [_write(tmp_path / "a.jsonl", rows[:120]), _write(tmp_path / "b.jsonl", rows[120:])]
    output = tmp_path / "tables" / "all.json"
    assert win_rates([*map(str, files), "--output", str(output)]) == 0
    assert "win / tie / lose of us on helpful by people" in capsys.readouterr().out
    assert {path.name for path in output.parent.iterdir()} == {"all.json", "all.csv", "all.md", "all.svg"}
    assert json.loads(output.read_text()) == as_json(summarise(rows))
    assert (output.parent / "all.svg").read_text().lstrip().startswith("<?xml")
    with pytest.raises(ConfigError, match=r"all\.csv exists already"):
        win_rates([str(files[0]), "--output", str(output)])
    with pytest.raises(ConfigError, match=r"must end in \.json"):
        win_rates([str(files[0]), "--output", str(tmp_path / "all")])


def test_judgments_are_read_back(tmp_path: Path) -> None:
    rows = _evaluations()
    assert read_judgments(_write(tmp_path / "a.jsonl", rows)) == rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outcome": "won"}, r"bad\.jsonl:1: \"outcome\" is 'won', not one of"),
        ({"ours_first": "refused"}, r"bad\.jsonl:1: \"ours_first\" is 'refused'"),
        ({"prompt": 3}, r'bad\.jsonl:1: no text "prompt"'),
        ({"outcome": ["win"]}, r"bad\.jsonl:1: \"outcome\" is \['win'\]"),
    ],
)
def test_a_wrong_judgment_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({**judgment_rows([judged("win")])[0], **change}) + "\n")
    with pytest.raises(ConfigError, match=message):
        read_judgments(path)


def test_other_files_are_no_judgments(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    for text, message in (("[1]\n", "not an object"), ("\n", "holds no judgments")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_judgments(path)


def test_brackets_of_a_name_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(Console(width=80), Table(caption="of [red]", header=("who", "%"), rows=[("[/b]", "1")], note="[/i]"))
    said = capsys.readouterr().out
    assert all(text in said for text in ("[/b]", "[red]", "[/i]"))


def test_files_that_go_together_are_there_all_or_none(tmp_path: Path) -> None:
    names = ["a.json", "x" * 300, "b.json"]  # no file system takes the second
    with pytest.raises(OSError, match="too long"):
        write_new({tmp_path / "new" / name: "text" for name in names})
    assert list((tmp_path / "new").iterdir()) == []
    write_new({tmp_path / "new" / name: name for name in ("a.json", "b.json")})
    assert [path.read_text() for path in sorted((tmp_path / "new").iterdir())] == ["a.json", "b.json"]
