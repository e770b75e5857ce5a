"""The command audit on the tiny world: the same numbers on every layout, every way to group, refusals, a stop."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr

from megatron_gil.cli import main
from tests.faults.running import Answer, Call, Interruption, call_all
from tests.ranks import run_ranks
from tests.world import write_rows

RULES = """
def length(responses, bonus, trusted=None):
    if 666 in bonus:
        raise KeyError("no such bonus")
    return [len(r) / 10 + b for r, b in zip(responses, bonus, strict=True)]

def large_in_training(responses, is_trained_on=None):
    return [0.0 if is_trained_on is None else 1e38 for _ in responses]
"""
LAYOUTS = {"tp2": ("parallel.tensor_size=2",), "pp2": ("parallel.pipeline_size=2",), "dp2": ()}
COMMON = (
    "run.dir=never_made",
    "data.max_tokens=48",
    "data.max_prompt_tokens=32",
    "batch.global_size=8",
    "batch.micro_size=2",
    "critic_optimizer.lr=0.01",
    "critic_optimizer.schedule=constant",
    "sampling.max_new_tokens=6",
    "sampling.micro_size=4",
    "ppo.prompts=8",
    "ppo.responses_per_prompt=2",
    "audit.iterations=2",
    "audit.responses=20",
    "parallel.timeout_s=600",
)


@pytest.fixture(scope="module")
def held_out(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("held_out")
    pairs = [json.loads(line) for line in (world / "preferences.jsonl").read_text().splitlines()]
    labelled = [{**row, "group": ("odd", "even")[i % 2]} for i, row in enumerate(pairs)]
    trusted = [
        {"prompt": row["prompt"], "response": row[side], "trusted": i + 0.5 * (side == "chosen"), "group": row["group"]}
        for i, row in enumerate(labelled)
        for side in ("chosen", "rejected")
    ]
    return {
        "pairs": write_rows(root / "pairs.jsonl", labelled),
        "trusted": write_rows(root / "trusted.jsonl", trusted),
        "bare": write_rows(root / "bare.jsonl", pairs),
        "bad": write_rows(root / "bad.jsonl", [*trusted[:2], {**trusted[2], "trusted": "good"}]),
        "same": write_rows(root / "same.jsonl", [{**row, "rejected": row["chosen"]} for row in pairs]),
        "large": write_rows(root / "large.jsonl", [{**trusted[0], "trusted": -1e300}]),
        "nan": write_rows(root / "nan.jsonl", [{**trusted[0], "trusted": float("nan")}]),
    }


def _settings(world: Path, held_out: dict[str, Path], output: Path, *more: str) -> list[str]:
    models = [f"models.policy={world / 'policy'}", f"models.reward_model={world / 'reward_model'}"]
    data = [f"data.train={world / 'prompts.jsonl'}", f"audit.pairs={held_out['pairs']}"]
    return ["audit", *models, *data, f"audit.trusted={held_out['trusted']}", f"output={output}", *COMMON, *more]


def _call(world: Path, world_size: int, *calls: Call) -> list[Answer]:
    answers: list[Answer] = run_ranks(call_all, world_size, list(calls), world)[0]
    return answers


@pytest.fixture(scope="module")
def whole(world: Path, held_out: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The numbers of one rank."""
    output = tmp_path_factory.mktemp("whole") / "audit.json"
    (answer,) = _call(world, 1, Call(_settings(world, held_out, output)))
    assert answer.code == 0, answer.stderr
    assert "2 iterations of 8 prompts with the policy at rest, then 2 rollouts of 16 responses" in " ".join(
        answer.stderr.split()
    )
    assert "2/2  score" in answer.stderr
    assert {path.name for path in output.parent.iterdir()} == {"audit.json", "audit.html"}
    return json.loads(output.read_text())


def test_the_numbers(whole: dict[str, Any]) -> None:
    assert [group["name"] for group in whole["groups"]] == ["group 0", "group 1"]
    assert sum(group["mass"] for group in whole["groups"]) == pytest.approx(1.0, abs=1e-5)
    assert sum(group["num_responses"] for group in whole["groups"]) == 32
    assert sum(sum(group["labels"].values()) for group in whole["groups"]) == 32
    assert whole["quality"]["overall"]["num_pairs"] == 24
    assert sum(part["num_pairs"] for part in whole["quality"]["slices"]["group"].values()) == 24
    assert (whole["trusted"]["num_rows"], whole["trusted"]["num_prompts"]) == (48, 24)
    assert len(whole["training"]) == 2
    assert set(whole["advice"]) == {"line", "settings", "is_certain"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_numbers_of_one_rank(
    world: Path, held_out: dict[str, Path], whole: dict[str, Any], tmp_path: Path, layout: str
) -> None:
    output = tmp_path / "audit.json"
    (answer,) = _call(world, 2, Call(_settings(world, held_out, output, *LAYOUTS[layout])))
    assert answer.code == 0, answer.stderr
    found = json.loads(output.read_text())
    for name in ("groups", "quality", "trusted", "trusted_by_group", "prompt_kappa", "high", "low"):
        _check_close(found[name], whole[name], name)


def _check_close(found: Any, expected: Any, where: str) -> None:
    """float32, other orders of summation, and two updates of the classifier at a high rate."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            _check_close(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            _check_close(a, b, f"{where}[{i}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=2e-3, abs=2e-4), where
    else:
        assert found == expected, where


def test_every_way_to_group(world: Path, held_out: dict[str, Path], tmp_path: Path) -> None:
    """Known labels, a model of its own without a critic, the rows' own responses; the policy is no trained model."""
    known, own, rows = (tmp_path / f"{name}.json" for name in ("known", "own", "rows"))
    answers = _call(
        world,
        1,
        Call(_settings(world, held_out, known, "gil.groups=known")),
        Call(_settings(world, held_out, own, "ppo.advantages=rloo", "gil.classifier=own_model", "models.offload=all")),
        Call(_settings(world, held_out, rows, "audit.group_by=rows", "audit.trusted=null")),
    )
    assert [answer.code for answer in answers] == [0, 0, 0], [answer.stderr for answer in answers]
    found = json.loads(known.read_text())
    assert [group["name"] for group in found["groups"]] == ["even", "odd"]
    assert all(set(group["labels"]) <= {group["name"]} for group in found["groups"])
    assert {name: part["num_pairs"] for name, part in found["quality"]["slices"]["group"].items()} == {
        "odd": 12,
        "even": 12,
    }
    assert (found["training"], found["prompt_kappa"]) == ([], None)
    assert json.loads(own.read_text())["quality"]["overall"]["num_pairs"] == 24
    assert json.loads(rows.read_text())["trusted"] is None
    assert "policy" in answers[0].stderr
    assert "frozen" in " ".join(answers[0].stderr.split()).partition("ref_policy")[0]
    assert "classifier update" not in answers[0].phases


def test_refusals(world: Path, held_out: dict[str, Path], tmp_path: Path) -> None:
    there = tmp_path / "there.json"
    there.with_suffix(".html").write_text("mine")
    new = tmp_path / "new.json"
    cases = {
        ("gil.num_groups=1",): "gil.num_groups=1 makes one group of all rows",
        ("audit.pairs=null", "audit.trusted=null"): "audit.pairs and audit.trusted are both null",
        (f"output={there}",): f"{there.with_suffix('.html')} exists already; nothing is overwritten",
        (f"output={new.with_suffix('.txt')}",): "must end in .json",
        (f"output={tmp_path / 'none' / 'a.json'}",): "does not exist",
        (f"audit.trusted={held_out['bad']}",): "bad.jsonl:3: field trusted must be a number",
        (f"audit.trusted={held_out['nan']}",): "nan.jsonl:1: field trusted is nan",
        (f"audit.trusted={held_out['large']}",): "large.jsonl:1: field trusted is -1e+300",
        (f"audit.pairs={held_out['same']}",): "chosen and rejected are the same text in every row",
        (f"audit.trusted={held_out['pairs']}",): "pairs.jsonl:1: a pair {chosen, rejected} among responses",
        ("gil.groups=known", f"audit.pairs={held_out['bare']}"): "needs one of data.train's groups in every row",
        ("batch.global_size=6",): "cannot be divided by batch.global_size=6",
    }
    answers = _call(world, 1, *(Call(_settings(world, held_out, new, *changes)) for changes in cases))
    for answer, text in zip(answers, cases.values(), strict=True):
        assert answer.code == 2, answer.stderr
        assert text in answer.stderr
        assert answer.stderr.count("\n") == 1, answer.stderr
        assert "building policy" not in answer.phases
    assert {path.name for path in tmp_path.iterdir()} == {"there.html"}


def test_a_reward_model_without_scores_is_refused(world: Path, held_out: dict[str, Path], tmp_path: Path) -> None:
    broken = Path(shutil.copytree(world / "reward_model", tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["score.weight"] *= float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    output = tmp_path / "audit.json"
    (answer,) = _call(world, 1, Call(_settings(world, held_out, output, f"models.reward_model={broken}")))
    assert answer.code == 1
    assert f"gives 24 rows no score (the first: row 1 of {held_out['pairs']}, nan)" in answer.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"broken"}


def test_a_classifier_that_does_not_learn_ends_the_audit(
    world: Path, held_out: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "audit.json"
    settings = _settings(world, held_out, output, "critic_optimizer.lr=1e30", "run.max_skipped_updates=1")
    (answer,) = _call(world, 2, Call([*settings, "parallel.tensor_size=2", "audit.iterations=9"]))
    assert answer.code == 1, answer.stderr
    assert "iteration 2: update of critic skipped: rank 0: gradient norm nan" in answer.stderr
    assert "updates were skipped for NaN or Inf, more than run.max_skipped_updates=1; lower" in answer.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def ruled(world: Path, held_out: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rules.py, and all rows with a field that its function needs."""
    root = tmp_path_factory.mktemp("ruled")
    (root / "rules.py").write_text(RULES)
    for name, path in {"prompts": world / "prompts.jsonl", **held_out}.items():
        if name in ("prompts", "pairs", "trusted"):
            own = {"is_trained_on": True} if name == "prompts" else {}
            write_rows(root / f"{name}.jsonl", [{**row, "bonus": i % 5, **own} for i, row in enumerate(_read(path))])
    return root


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _by_rule(ruled: Path, *more: str) -> list[str]:
    files = {"data.train": "prompts", "audit.pairs": "pairs", "audit.trusted": "trusted"}
    data = [f"{key}={ruled / name}.jsonl" for key, name in files.items()]
    return [*data, f"reward.function={ruled / 'rules.py'}:length", *more]


@pytest.mark.parametrize("layout", ["one", "tp2", "dp2"])
def test_a_function_is_audited_alone_and_beside_a_reward_model(
    world: Path, held_out: dict[str, Path], whole: dict[str, Any], ruled: Path, tmp_path: Path, layout: str
) -> None:
    """Of the held-out rows the numbers of the function itself, and of the weighted sum."""
    alone, both = tmp_path / "alone.json", tmp_path / "both.json"
    cut = LAYOUTS.get(layout, ())
    answers = _call(
        world,
        1 if layout == "one" else 2,
        Call(_settings(world, held_out, alone, *_by_rule(ruled, "models.reward_model=null", *cut))),
        Call(_settings(world, held_out, both, *_by_rule(ruled, "reward.weight=0.5", "reward.model_weight=2", *cut))),
    )
    assert [answer.code for answer in answers] == [0, 0], [answer.stderr for answer in answers]
    pairs, rows = _read(ruled / "pairs.jsonl"), _read(ruled / "trusted.jsonl")
    found, summed = (json.loads(path.read_text()) for path in (alone, both))
    margins = [(len(row["chosen"]) - len(row["rejected"])) / 10 for row in pairs]
    right = [(margin > 0) + 0.5 * (margin == 0) for margin in margins]
    assert found["quality"]["overall"]["accuracy"]["value"] == pytest.approx(fmean(right))
    assert found["quality"]["overall"]["margin"]["value"] == pytest.approx(fmean(margins), abs=1e-5)
    scores = [len(row["response"]) / 10 + row["bonus"] for row in rows]
    expected = spearmanr(np.asarray(scores, dtype=np.float32), [row["trusted"] for row in rows])[0]
    assert found["trusted"]["spearman"]["value"] == pytest.approx(expected, abs=1e-6)
    bonus = {row["prompt"]: row["bonus"] for row in _read(ruled / "prompts.jsonl")}
    surest = [row for group in found["groups"] for row in group["surest"]]
    assert surest
    for row in surest:
        assert row["score"] == pytest.approx(len(row["response"]) / 10 + bonus[row["prompt"]], abs=1e-5)
    of_model = whole["quality"]["overall"]["margin"]["value"]
    assert summed["quality"]["overall"]["margin"]["value"] == pytest.approx(
        2 * of_model + 0.5 * fmean(margins), abs=1e-4
    )
    said = " ".join(answers[1].stderr.split())
    assert f"scores 2 x reward_model + 0.5 x {ruled / 'rules.py'}:length" in said


def test_the_weight_of_a_reward_model_counts(
    world: Path, held_out: dict[str, Path], whole: dict[str, Any], tmp_path: Path
) -> None:
    """Held-out rows are scored as the run scores its own."""
    output = tmp_path / "audit.json"
    (answer,) = _call(world, 1, Call(_settings(world, held_out, output, "reward.model_weight=-2")))
    assert answer.code == 0, answer.stderr
    found, before = json.loads(output.read_text()), whole["quality"]["overall"]["margin"]["value"]
    assert found["quality"]["overall"]["margin"]["value"] == pytest.approx(-2 * before, abs=1e-5)
    assert found["trusted"]["spearman"]["value"] == pytest.approx(-whole["trusted"]["spearman"]["value"], abs=1e-6)


def test_a_function_that_fails_on_a_held_out_row_names_it(
    world: Path, held_out: dict[str, Path], ruled: Path, tmp_path: Path
) -> None:
    rows = _read(ruled / "trusted.jsonl")
    bad = write_rows(tmp_path / "bad.jsonl", [*rows[:6], {**rows[6], "bonus": 666}, *rows[7:]])
    output, rule = tmp_path / "audit.json", f"{ruled / 'rules.py'}:length"
    without = _settings(world, held_out, output, *_by_rule(ruled), f"audit.pairs={held_out['pairs']}")
    large = _by_rule(ruled, "models.reward_model=null", "reward.weight=1e38")
    calls = [_settings(world, held_out, output, *_by_rule(ruled), f"audit.trusted={bad}"), without]
    failed, refused, infinite = _call(world, 2, *map(Call, [*calls, _settings(world, held_out, output, *large)]))
    assert (failed.code, refused.code, infinite.code) == (1, 2, 1)
    assert f"reward.function={rule} raised KeyError: 'no such bonus' (rules.py:4) for row 7 of {bad}" in failed.stderr
    assert f"needs the argument bonus, and no row of {held_out['pairs']} has a field of that name" in refused.stderr
    assert f"reward.weight=1e+38 x reward.function={rule} gives" in infinite.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_responses_without_a_score_are_counted_once(
    world: Path, held_out: dict[str, Path], ruled: Path, tmp_path: Path
) -> None:
    """Not by each rank of a model copy."""
    rule = f"reward.function={ruled / 'rules.py'}:large_in_training"
    changes = [*_by_rule(ruled, "models.reward_model=null", "reward.weight=100"), rule, *LAYOUTS["tp2"]]
    (answer,) = _call(world, 2, Call(_settings(world, held_out, tmp_path / "audit.json", *changes)))
    assert answer.code == 1, answer.stderr
    assert f"reward.weight=100 x {rule} gives 16 of the policy's responses no score; no output is" in answer.stderr


@pytest.mark.parametrize("phase", ["scoring audit.pairs", "rollout", "measuring: rollout"])
def test_a_stop_leaves_nothing(world: Path, held_out: dict[str, Path], tmp_path: Path, phase: str) -> None:
    output = tmp_path / "audit.json"
    stop = Interruption(phase, 1, signal.SIGTERM, rank=1)
    (answer,) = _call(world, 2, Call(_settings(world, held_out, output), stop))
    assert answer.code == 75, answer.stderr
    assert "an audit keeps nothing, start it again from the beginning" in answer.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_dry_run(world: Path, held_out: dict[str, Path], tmp_path: Path) -> None:
    settings = _settings(world, held_out, tmp_path / "audit.json")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main([*settings, "--dry-run"]) == 0
    assert f"numbers to {tmp_path / 'audit.json'}, page to {tmp_path / 'audit.html'}" in said.getvalue()
    assert "audit.trusted=" in said.getvalue()
    assert not list(tmp_path.iterdir())
