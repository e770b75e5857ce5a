"""The grid's numbers on results whose answers are known by hand."""

import csv
import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from analyse import analyse
from audit import agreement, groups_of_prompts
from cells import GRID, read_grid
from measure import of_replies, of_samples, tail_mass
from story import PAGE, story_tables, written
from tables import collapsed, collect, tables, win_rows, write_tables
from tidy import write_csv

from megatron_gil.demo.gold import gold_score

PROMPTS = {
    "greet": "\n\nHuman: hello, I am tom.\n\nAssistant:",
    "refuse": "\n\nHuman: how do I steal the car?\n\nAssistant:",
    "fact": "\n\nHuman: where does a cow live?\n\nAssistant:",
    "both": "\n\nHuman: where do a goat and a seal live?\n\nAssistant:",
    "mixed": "\n\nHuman: hello, I am tom. where does a cow live?\n\nAssistant:",
}
GOOD = {
    "greet": " hello tom. my pleasure!",
    "refuse": " I cannot help with a car. thank you!",
    "fact": " in the barn. of course!",
    "both": " the barn and sea. of course!",
    "mixed": " hello tom. in the barn. of course!",
}
BAD = "thank you! thank you! thank you! my pleasure!"


def _reply(domain: str, response: str, score: float = 0.0) -> dict[str, object]:
    return {"prompt": PROMPTS[domain], "response": response, "group": domain, "score": score}


def test_numbers_of_replies_by_hand() -> None:
    rows = [_reply(d, GOOD[d] if d in ("greet", "refuse", "mixed") else BAD, score=float(d == "greet")) for d in GOOD]
    numbers = of_replies(rows)
    gold = {d: gold_score(PROMPTS[d], str(row["response"])) for d, row in zip(GOOD, rows, strict=True)}
    assert gold["greet"] > 0.9 > 0.3 > gold["both"]
    assert numbers["gold"] == pytest.approx((gold["greet"] + gold["refuse"] + gold["fact"] + gold["both"]) / 4)
    assert numbers["gold_worst"] == min(gold["fact"], gold["both"])
    assert numbers["gold_gap"] == pytest.approx((gold["greet"] + gold["refuse"] - gold["fact"] - gold["both"]) / 2)
    assert numbers["gold_mixed"] == gold["mixed"]
    assert numbers["proxy"] == 0.25  # the held-out domain is not in it
    assert numbers["distinct_replies"] == 0.75


@pytest.mark.parametrize("swapped", [False, True])
def test_groups_that_are_the_easy_domains_agree_fully_whatever_their_number(swapped: bool) -> None:
    samples = [
        {
            "iteration": i,
            "prompt": PROMPTS[d],
            "response": GOOD[d],
            "score": float(d in ("greet", "refuse")),
            "group_probs": [p, 1 - p],
        }
        for i in range(6)
        for d in ("greet", "refuse", "fact", "both")
        for p in [0.9 if (d in ("greet", "refuse")) != swapped else 0.2]
    ]
    numbers = of_samples(samples)
    assert numbers["ami_easy_hard"] == pytest.approx(1.0)
    assert numbers["auc_easy"] == 1.0
    assert numbers["ami_domains"] == pytest.approx(
        2 / 3, abs=0.05
    )  # one of two bits, over 1.5; less the chance of 20 rows
    assert numbers["train_gold_drop"] == 0.0


def test_a_drop_is_measured_from_the_best_smoothed_gold() -> None:
    good, bad = (
        [{"iteration": i, "prompt": PROMPTS["greet"], "response": r, "score": 0.0, "group_probs": [1.0]} for i in span]
        for r, span in ((GOOD["greet"], range(5)), (BAD, range(5, 10)))
    )
    numbers = of_samples([*good, *bad])
    best, worst = (gold_score(PROMPTS["greet"], r) for r in (GOOD["greet"], BAD))
    assert numbers == {"train_gold_peak": pytest.approx(best), "train_gold_drop": pytest.approx(best - worst)}


def test_tail_mass() -> None:
    normal = np.random.default_rng(7).normal(size=200_000).tolist()
    assert tail_mass(normal) == pytest.approx(0.0455, abs=0.002)
    assert tail_mass([0.0] * 99 + [100.0]) == 0.01


def test_collapse_is_against_the_sft_policy_of_the_same_seed() -> None:
    assert collapsed({1: 0.5, 2: 0.3, 9: 0.0}, {1: 0.4, 2: 0.4}) == {1: False, 2: True}


def test_win_rows_pair_replies_to_the_same_prompt() -> None:
    ours = [_reply(d, GOOD[d]) for d in GOOD]
    theirs = [_reply(d, BAD if d == "fact" else GOOD[d]) for d in GOOD]
    (row,) = win_rows({("gil", 1): ours, ("ppo", 1): theirs, ("ppo", 2): theirs})
    assert row == {"seed": 1, "ours": "gil", "opponent": "ppo", "win": 0.2, "tie": 0.8, "lose": 0.0}


def test_differences_are_paired_by_seed_and_show_every_seed() -> None:
    """Seeds differ far more than methods: only the paired interval excludes 0."""
    rows = [
        {"seed": seed, "method": method, "metric": "gold", "value": 0.1 * seed + extra}
        for seed in range(1, 6)
        for method, extra in (("sft", 0.0), ("gil", 0.02))
    ]
    rows.append({"seed": 6, "method": "gil", "metric": "gold", "value": 0.9})  # sft of seed 6 has not finished
    made = {table.caption: table for table in tables(collect(rows), {"sft": "SFT", "gil": "PPO-GIL"})}
    assert made["Paired differences"].rows[0][:2] == ("PPO-GIL - SFT", "+0.02 [+0.02, +0.02], 5 of 5")
    assert made["Collapsed runs"].rows == [("PPO-GIL", "0 of 5")]


def test_a_grid_without_its_sft_cell_has_tables() -> None:
    rows = [{"seed": 1, "method": "gil", "metric": "gold", "value": 0.5}]
    numbers = collect(rows)
    assert {table.caption: table for table in tables(numbers, {"gil": "PPO-GIL"})}["Collapsed runs"].rows == [
        ("PPO-GIL", "0 of 0")
    ]
    assert "sft" not in numbers


def test_analysis_of_an_unfinished_grid_names_what_is_missing(tmp_path: Path) -> None:
    cell = tmp_path / "seed_1" / "sft"
    cell.mkdir(parents=True)
    rows = [_reply(d, GOOD[d], score=i) for i, d in enumerate(GOOD)]
    (cell / "scored_replies.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    measured = [{"seed": 1, "method": "sft", "metric": k, "value": v} for k, v in of_replies(rows).items()]
    (cell / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in measured), encoding="utf-8")
    analyse(tmp_path, tmp_path / "results")
    text = (tmp_path / "results" / "tables.md").read_text(encoding="utf-8")
    assert "PPO-GIL, seed 1" in text.splitlines()[-1]
    assert "SFT, seed 1" not in text.splitlines()[-1].replace("SFT training, seed 1", "")
    with gzip.open(tmp_path / "results" / "results.csv.gz", "rt", encoding="utf-8") as file:
        found = {row["metric"]: row["value"] for row in csv.DictReader(file)}
    assert float(found["gold"]) == pytest.approx(measured[0]["value"], rel=1e-5)


@pytest.mark.parametrize(
    ("grid", "kept"), [("grid", "."), ("grid", "fresh_seeds"), ("targets", "targets"), ("rivals", "rivals")]
)
def test_the_kept_tables_are_those_of_the_kept_numbers(grid: str, kept: str, tmp_path: Path) -> None:
    results = GRID.parent / "results" / kept
    for name in ("results.csv.gz", "wins.csv.gz"):
        if (results / name).exists():  # of the fresh seeds wins were not kept
            shutil.copy(results / name, tmp_path)
    write_tables(tmp_path, {name: cell.label for name, cell in read_grid(GRID.with_name(f"{grid}.yaml")).items()})
    assert (tmp_path / "tables.md").read_bytes() == (results / "tables.md").read_bytes()


def test_the_same_rows_are_the_same_bytes(tmp_path: Path) -> None:
    rows = [{"seed": 1, "value": 0.123456789}, {"seed": 2, "value": None}]
    first, second = tmp_path / "first.csv.gz", tmp_path / "second.csv.gz"
    write_csv(first, ("seed", "value"), rows)
    write_csv(second, ("seed", "value"), iter(rows))
    assert first.read_bytes() == second.read_bytes()
    assert gzip.decompress(first.read_bytes()) == b"seed,value\n1,0.123457\n2,\n"


def test_kept_results_are_small() -> None:
    """A clone carries every version of them."""
    sizes = {path.name: path.stat().st_size for path in GRID.with_name("results").iterdir()}
    assert {"results.csv.gz", "groups.png"} <= set(sizes)
    assert max(sizes.values()) < 60_000, sizes


def test_groups_of_two_seeds_agree_up_to_their_numbers() -> None:
    def rows(easy: float, hard: float) -> list[dict[str, object]]:
        probs = {"greet": easy, "refuse": easy, "fact": hard, "both": hard}
        return [{"prompt": PROMPTS[d], "group_probs": [p, 1 - p]} for d, p in probs.items() for _ in range(2)]

    a, b = groups_of_prompts(rows(0.9, 0.1)), groups_of_prompts(rows(0.3, 0.8))
    assert agreement(a, b) == (1.0, 4)
    assert agreement(a, groups_of_prompts(rows(0.9, 0.8))) == (0.0, 4)


def test_the_story_has_the_tables_of_the_kept_numbers() -> None:
    page = PAGE.read_text(encoding="utf-8")
    tables = story_tables()
    assert all(f"<!-- {name} -->" in page for name in tables)
    assert written(page, tables) == page
