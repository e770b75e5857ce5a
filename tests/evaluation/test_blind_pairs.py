"""Preferences as two files of responses, and the recorded verdicts beside them."""

import json
import random
from pathlib import Path

import pytest

from megatron_gil.commands.blind_pairs import blind_pairs
from megatron_gil.config import ConfigError
from megatron_gil.evaluation.comparisons import pair_files, read_judgments
from megatron_gil.evaluation.judge import ScoreJudge
from megatron_gil.evaluation.tables import summarise
from megatron_gil.evaluation.winrate import judge_all


def _preferences(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    names = ("prompt", "chosen", "rejected")
    path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    return path


def test_verdicts_follow_the_preferred_response(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(0)
    rows = [(f"p{i}", "c" * rng.randint(1, 50), "r" * rng.randint(1, 50)) for i in range(300)]
    source = _preferences(tmp_path / "preferences.jsonl", rows)
    out = tmp_path / "out"
    assert blind_pairs([str(source), "--output", str(out), "--task", "letters"]) == 0
    recorded = read_judgments(out / "recorded.judgments.jsonl")
    for (prompt, chosen, rejected), j in zip(rows, recorded, strict=True):
        assert (j.prompt, j.task) == (prompt, "letters")
        assert (j.ours, j.theirs) == ((chosen, rejected) if j.outcome == "win" else (rejected, chosen))
    first = sum(j.outcome == "win" for j in recorded)
    assert 120 < first < 180
    assert f"300 pairs in {out}, the preferred response in a.jsonl for {first} of them" in capsys.readouterr().out

    (pairs,) = pair_files(out / "a.jsonl", [out / "b.jsonl"]).values()
    knows = ScoreJudge("knows", lambda prompt, response: float(response.startswith("c")))
    (agreement,) = summarise([*recorded, *judge_all(knows, pairs, task="letters")]).pairs
    assert (agreement.num_items, agreement.agreed.value, agreement.kappa.value) == (300, 1.0, 1.0)


def test_the_coin_depends_on_the_texts_and_not_on_which_is_preferred(tmp_path: Path) -> None:
    """Else the file in which a text lies would give the verdict away."""
    rows = [(f"p{i}", f"one {i}", f"two {i}") for i in range(100)]
    sides = []
    for name, given in (("one", rows), ("other", [(p, r, c) for p, c, r in rows])):
        out = tmp_path / name
        blind_pairs([str(_preferences(tmp_path / f"{name}.jsonl", given)), "--output", str(out)])
        sides.append((out / "a.jsonl").read_text())
    assert sides[0] == sides[1]
    assert 30 < sides[0].count("one ") < 70


def test_equal_responses_are_a_tie_and_limit_cuts(tmp_path: Path) -> None:
    source = _preferences(tmp_path / "p.jsonl", [("p", "same", " same"), ("q", "a", "b")])
    blind_pairs([str(source), "--output", str(tmp_path / "out"), "--limit", "1"])
    (judgment,) = read_judgments(tmp_path / "out" / "recorded.judgments.jsonl")
    assert judgment.outcome == "tie"


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    source = tmp_path / "p.jsonl"
    for text, message in (
        ('{"prompt": "p", "chosen": "c"}\n', r'p\.jsonl:1: not \{"prompt", "chosen", "rejected"\}'),
        ("[]\n", r"p\.jsonl:1: not"),
        ("\n", r"p\.jsonl: holds no preferences"),
    ):
        source.write_text(text)
        with pytest.raises(ConfigError, match=message):
            blind_pairs([str(source), "--output", str(tmp_path / "out")])
    good = str(_preferences(source, [("p", "a", "b")]))
    with pytest.raises(ConfigError, match="--limit 0 must be at least 1"):
        blind_pairs([good, "--output", str(tmp_path / "out"), "--limit", "0"])
    blind_pairs([good, "--output", str(tmp_path / "out")])
    with pytest.raises(ConfigError, match=r"a\.jsonl exists already"):
        blind_pairs([good, "--output", str(tmp_path / "out")])
