"""The command `evaluate`: files in, table out."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_gil.commands.evaluate import evaluate
from megatron_gil.config import ConfigError
from megatron_gil.evaluation.judge import ScoreFn


def run(arguments: Sequence[object], gold_score: ScoreFn = lambda prompt, response: 0.0) -> int:
    return evaluate([str(a) for a in arguments], gold_score=gold_score)


def _responses(path: Path, *responses: str) -> Path:
    rows = [{"prompt": f"p{i}", "response": r, "score": float(len(r))} for i, r in enumerate(responses)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_evaluate_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = _responses(tmp_path / "ours.jsonl", "aaa", "a", "bb", "bbb")
    theirs = _responses(tmp_path / "sft.jsonl", "a", "aa", "cc", "c")
    table = tmp_path / "table.json"
    assert run([ours, theirs, "--output", table]) == 0
    assert "sft" in capsys.readouterr().out
    written = json.loads(table.read_text())["opponents"]["sft"]
    assert [written[key]["value"] for key in ("win", "tie", "lose")] == [0.5, 0.25, 0.25]
    gold = [ours, theirs, "--judge", "gold", "--output", tmp_path / "gold.json"]
    run(gold, gold_score=lambda p, r: -float(len(r)))
    assert json.loads((tmp_path / "gold.json").read_text())["opponents"]["sft"]["lose"]["value"] == 0.5
    with pytest.raises(ConfigError, match="exists already"):
        run(gold)


def test_evaluate_names_file_line_and_field(tmp_path: Path) -> None:
    ours = _responses(tmp_path / "ours.jsonl", "a")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "p0"}\n')
    with pytest.raises(ConfigError, match=r'bad\.jsonl:1: no text "response"'):
        run([ours, bad])
    for value in ("NaN", "Infinity", "-Infinity", "1e999"):
        bad.write_text(f'{{"prompt": "p0", "response": "r", "score": {value}}}\n')
        with pytest.raises(ConfigError, match=r"bad\.jsonl:1: the score -?(nan|inf) cannot be compared"):
            run([ours, bad])
    bad.write_bytes(b'{"prompt": "p0", "response": "r"}\n{"prompt": "\xff"}\n')
    with pytest.raises(ConfigError, match=r"bad\.jsonl:2: not UTF-8"):
        run([ours, bad])
    with pytest.raises(ConfigError, match=r"absent\.jsonl: cannot be read"):
        run([ours, tmp_path / "absent.jsonl"])
