"""The map: which cell stands for a method, and what is said of finished worlds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from map import World, read_map
from map_tables import REACH, fit, map_picture, read_numbers, worlds_table, write_map, write_numbers
from omegaconf import OmegaConf

from megatron_gil.config import ConfigError
from megatron_gil.demo.annotators import Annotators
from megatron_gil.evaluation.report.runs import Json

FACT = "\n\nHuman: one question: what is the home of a tiger?\n\nAssistant:"
GREET = "\n\nHuman: hi, my name is lily. I am new here.\n\nAssistant:"


@pytest.fixture
def world(tmp_path: Path) -> World:
    """With all that its methods are chosen from: PPO is best at eta 0.4, PPO-GIL at 0.8."""
    drawn = read_map()
    world = World(tmp_path / "hard_2", Annotators(hard_comparisons=2.0), drawn)
    world._write_grid({})
    for seed in drawn.tuning_seeds:
        for cell in world.tuned_cells():
            _finish(world, cell, seed, {"gold": 0.6 if cell in ("ppo_0.4", "gil_0.8") else 0.5 - 0.001 * seed})
        # The reward model likes the longest. One phrase is worth the most to a greeting, and to a fact its right word.
        greetings = [" hello lily.", " hello lily. thank you!", " hello lily. thank you! thank you! thank you!", " no."]
        facts = [" no.", " I do not know.", " in the sea I think.", " it lives in the jungle."]
        replies = [(GREET, text, 9 + len(text)) for text in greetings] + [(FACT, text, len(text)) for text in facts]
        rows = [{"prompt": prompt, "response": text, "score": float(score)} for prompt, text, score in replies]
        place = world.place(REACH, seed)
        place.cell_dir.mkdir(parents=True)
        place.replies.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return world


def _finish(world: World, cell: str, seed: int, numbers: dict[str, float]) -> None:
    place = world.place(cell, seed)
    place.cell_dir.mkdir(parents=True)
    rows = [{"metric": metric, "value": value} for metric, value in numbers.items()]
    place.rows.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_each_method_gets_the_eta_that_is_best_on_the_tuning_seeds(world: World) -> None:
    chosen = world.choose()
    assert chosen["ppo"] == "ppo_0.4"
    assert chosen["gil"] == "gil_0.8"
    assert chosen["floor"] == "floor_0.8"
    assert chosen["penalty"] == "penalty_0.4"
    settings = world.place("penalty_0.4", 21).cell.settings
    assert "gil.num_groups=2" in settings
    assert [s for s in settings if s.startswith(("ppo.kl_coef", "gil.adaptive_kl"))][-2:] == [
        "ppo.kl_coef=0.4",
        "gil.adaptive_kl=false",
    ]


def test_targets_are_those_that_an_audit_of_the_tuning_seeds_advises(world: World) -> None:
    chosen = world.choose()["targets"]
    of_high, of_low = chosen.split("_")[1:]
    settings = world.place(chosen, 21).cell.settings
    assert f"gil.kl_target_high={of_high}" in settings
    assert f"gil.kl_target_low={of_low}" in settings
    assert float(of_low) > float(of_high)  # gold of the facts rises with the score to the end


def test_a_world_is_written_as_its_annotators_say(world: World) -> None:
    tree = OmegaConf.load(world.grid)
    assert tree.annotators.hard_comparisons == 2.0
    assert world.place("reward", 21).cell.iterations == 270  # 6,000 easy and 12,000 hard comparisons, 64 an update
    assert read_map().worlds.keys() == {f"hard_{h}_flattery_{f}" for h in (1, 3, 6) for f in (0.5, 1, 2)}


def test_unknown_worlds_are_named() -> None:
    with pytest.raises(ConfigError, match=r"--worlds nowhere: .* has map, new, unseen"):
        read_map("nowhere")


def _rows(gains: dict[str, float]) -> list[Json]:
    """Worlds in which reward and gold agree by 0.2, 0.4, ... where the score is high, and in which PPO-GIL gains as
    given, plus or minus 0.01 by seed."""
    rows: list[Json] = []
    for i, (world, gain) in enumerate(gains.items(), start=1):
        for seed, noise in ((21, 0.01), (22, -0.01)):
            found = {
                ("sft", "sft"): {"gold": 0.3},
                ("ppo", "ppo_0.4"): {"gold": 0.5 + seed / 100},
                ("gil", "gil_0.8"): {"gold": 0.5 + seed / 100 + gain + noise, "seconds": 1.0},
                ("targets", "targets_0.6_2"): {"gold": 0.5 + seed / 100 + gain / 2},
                (REACH, REACH): {
                    "price": 0.02,
                    "spearman_high": i / 5 + noise,
                    **{f"{n}_{g}": 1.0 for n in ("best_n", "accuracy") for g in ("high", "low")},
                    "spearman_low": 0.5,
                },
            }
            rows += [
                {"world": world, "seed": seed, "method": method, "cell": cell, "metric": metric, "value": value}
                for (method, cell), numbers in found.items()
                for metric, value in (dict.fromkeys(("gold_worst", "gold_mixed"), 0.1) | numbers).items()
            ]
    return rows


def test_what_is_kept_says_the_same_as_the_runs(tmp_path: Path) -> None:
    gains = {"a": -0.05, "b": 0.01, "c": 0.02}
    write_numbers(tmp_path / "map.csv.gz", _rows(gains))
    worlds = read_numbers(tmp_path / "map.csv.gz")
    assert [world.name for world in worlds] == ["a", "b", "c"]
    assert [world.gain("gil") for world in worlds] == pytest.approx(list(gains.values()), abs=1e-6)
    assert [world.reach("spearman_high") for world in worlds] == pytest.approx([0.2, 0.4, 0.6])
    assert "seconds" not in worlds[0].numbers["gil"]
    slope, intercept = np.polyfit([0.2, 0.4, 0.6], list(gains.values()), 1)
    assert fit(worlds, "gil") == pytest.approx((slope, intercept), abs=1e-5)


def test_tables_and_picture(tmp_path: Path) -> None:
    write_numbers(tmp_path / "map.csv.gz", _rows({"a": -0.05, "b": 0.01, "c": 0.02}))
    write_numbers(tmp_path / "new.csv.gz", _rows({"d": 0.03, "e": -0.03, "f": 0.05, "g": 0.07}))
    write_map(tmp_path, {"ppo": "PPO w/ KL", "gil": "PPO-GIL", "targets": "KL targets"})
    text = (tmp_path / "map.md").read_text(encoding="utf-8")
    assert "| a | -0.050 [-0.177, +0.077], 0 of 2 | -0.025 [" in text
    assert "### Gain in gold: new" in text
    forecast = text.partition("### Forecast and found")[2].splitlines()
    slope, intercept = np.polyfit([0.2, 0.4, 0.6], [-0.05, 0.01, 0.02], 1)
    assert f"| d | 0.20 | {slope * 0.2 + intercept:+.3f} | +0.030 [" in forecast[4]
    advice = [line.split(" | ")[-2:] for line in forecast[4:8]]
    assert [" ".join(cells).removesuffix(" |") for cells in advice] == [
        "KL targets right",
        "KL targets wrong",  # they lose 0.015
        "KL targets right",
        "one KL wrong",  # KL targets gain 0.035
    ]
    assert "ppo_0.4, gil_0.8, targets_0.6_2" in text
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    sets = {"map": read_numbers(tmp_path / "map.csv.gz"), "new": read_numbers(tmp_path / "new.csv.gz")}
    left, right = map_picture(sets, {"gil": "PPO-GIL", "targets": "KL targets"}).axes
    assert [left.get_title(loc="left"), right.get_title(loc="left")] == ["PPO-GIL", "KL targets"]
    assert len(worlds_table("map", sets["map"]).rows) == 3
