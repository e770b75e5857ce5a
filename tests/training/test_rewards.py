"""Runs whose scores come from a Python function, alone and beside a reward model: the same on every layout, resumed bit
for bit, and ended on all ranks by a function that fails on one."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.running import Answer, Call, arguments, call_all
from tests.ranks import run_ranks
from tests.world import write_rows

SOURCE = '''
import os, time

def vowels(prompts, responses, bonus, group):
    """Of all that it is given, so that a wrong order or another text changes it."""
    with open(os.environ["CALLS"], "a") as file:
        file.write(f"{os.environ.get('RANK', '0')}\\n")
    rows = zip(prompts, responses, bonus, group, strict=True)
    return [sum(r.count(v) for v in "aeiou") / 4 + b + len(p) % 3 - 0.5 * (g == "odd") for p, r, b, g in rows]

def fails_on_one(prompts, responses, bonus):
    """Its tenth call, of whichever rank: one rank knows, the others wait."""
    if max(bonus) >= 2.3:
        raise ValueError("a bonus that I do not like")
    return [0.0] * len(responses)

def gives_nan(responses, bonus):
    return [float("nan") if b > 1 else b for b in bonus]

def sleeps(responses, **_):
    time.sleep(300)
'''
ALONE = ("models.reward_model=null",)
LAYOUTS = {
    "one": (1, ()),
    "tp2": (2, ("parallel.tensor_size=2",)),
    "pp2": (2, ("parallel.pipeline_size=2",)),
    "dp2": (2, ()),
}
KINDS = {
    "gae": ALONE,
    "grpo": (*ALONE, "ppo.advantages=grpo", "ppo.responses_per_prompt=2", "reward.threads=3"),
    "both": ("reward.weight=0.5", "reward.model_weight=2"),
}


@pytest.fixture(scope="module")
def place(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rules.py, and the world's prompts with a bonus."""
    directory = tmp_path_factory.mktemp("rewards")
    (directory / "rules.py").write_text(SOURCE)
    for name, count in (("prompts", 24), ("held_out", 23)):
        rows = [json.loads(line) for line in (world / "prompts.jsonl").read_text().splitlines()][:count]
        write_rows(directory / f"{name}.jsonl", [{**row, "bonus": i / 10} for i, row in enumerate(rows)])
    return directory


def _run(world: Path, place: Path, run: Path, *more: str, function: str = "vowels") -> list[str]:
    data = [f"data.train={place / 'prompts.jsonl'}", f"data.eval={place / 'held_out.jsonl'}"]
    return arguments("ppo", world, run, *data, f"reward.function={place / 'rules.py'}:{function}", *more)


def _call(world_size: int, world: Path, calls: list[list[str]], log: Path) -> list[list[Answer]]:
    """Each rank's answers."""
    return run_ranks(_call_and_count, world_size, calls, world, log)


def _call_and_count(calls: list[list[str]], world: Path, log: Path) -> list[Answer]:
    import os

    os.environ["CALLS"] = str(log)
    return call_all([Call(call) for call in calls], world)


def _metrics(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def _tensors(run: Path) -> dict[str, torch.Tensor]:
    files = sorted(max((run / "checkpoints").glob("iter_*")).rglob("*.safetensors"))
    return {f"{file.parent.name}/{name}": t for file in files for name, t in load_file(file).items()}


@pytest.fixture(scope="module")
def runs(world: Path, place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each kind on each layout, and beside them which ranks called the function."""
    directory = tmp_path_factory.mktemp("runs")
    for layout, (world_size, settings) in LAYOUTS.items():
        kinds = KINDS if layout in ("one", "dp2") else ("gae",)
        calls = [_run(world, place, directory / f"{kind}_{layout}", *KINDS[kind], *settings) for kind in kinds]
        answers = _call(world_size, world, calls, directory / f"calls_{layout}")[0]
        assert [answer.code for answer in answers] == [0] * len(calls), answers
    return directory


@pytest.mark.parametrize(("kind", "layout"), [("gae", "tp2"), ("gae", "pp2"), *((kind, "dp2") for kind in KINDS)])
def test_every_layout_gives_the_run_of_one_rank(kind: str, layout: str, runs: Path) -> None:
    """Of the first rollout and its scores; weights differ by rounding from then on."""
    first, other = (_metrics(runs / f"{kind}_{name}")[0] for name in ("one", layout))
    assert first.keys() == other.keys()
    for name in ("reward/score_mean", "reward/score_std", "policy/kl_sequence", "policy/entropy", "response/tokens"):
        assert other[name] == pytest.approx(first[name], rel=1e-4, abs=1e-5), name
    last = [_metrics(runs / f"{kind}_{name}")[-1] for name in ("one", layout)]
    assert "eval/reward/score_mean" in last[0]
    assert last[0].keys() == last[1].keys()


def test_one_rank_of_each_model_copy_calls(runs: Path) -> None:
    called = {name: set((runs / f"calls_{name}").read_text().split()) for name in LAYOUTS}
    assert called == {"one": {"0"}, "tp2": {"0"}, "pp2": {"0"}, "dp2": {"0", "1"}}


def test_scores_are_the_functions_numbers_of_the_texts(world: Path, place: Path, runs: Path) -> None:
    """Of the samples of the log, against a call of our own."""
    scope: dict[str, Any] = {}
    exec(SOURCE.replace('open(os.environ["CALLS"], "a")', 'open(os.devnull, "w")'), scope)
    rows = {row["prompt"]: row for row in map(json.loads, (place / "prompts.jsonl").read_text().splitlines())}
    samples = [json.loads(line) for line in (runs / "gae_one" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) >= 4
    for sample in samples:
        (row,) = [row for prompt, row in rows.items() if prompt == sample["prompt"].strip()]
        expected = scope["vowels"]([row["prompt"]], [sample["response"]], [row["bonus"]], [row["group"]])
        assert sample["score"] == pytest.approx(expected[0], rel=1e-6)
    assert len({sample["score"] for sample in samples}) > 1


def test_a_weighted_sum_of_both(runs: Path) -> None:
    for row in _metrics(runs / "both_one"):
        total = 2 * row["reward/model_mean"] + 0.5 * row["reward/function_mean"]
        assert row["reward/score_mean"] == pytest.approx(total, rel=1e-5)
        assert "reward/out_of_range_fraction" in row
    for row in _metrics(runs / "gae_one"):
        assert "reward/model_mean" not in row
        assert "reward/out_of_range_fraction" not in row, "a function has no range of scores that it was trained on"
        assert "alarm/score" not in row


def test_without_a_reward_model_critic_and_classifier_start_from_the_policy(world: Path, runs: Path) -> None:
    assert {path.name for path in (runs / "gae_one/checkpoints/iter_0000004").iterdir() if path.is_dir()} >= {
        "policy",
        "critic",
        "classifier",
    }
    assert not (runs / "grpo_one/checkpoints/iter_0000004/critic").exists()
    # One update at most has moved them; the reward model's weights are shifted by 0.02 everywhere.
    policy, reward_model = (load_file(world / name / "model.safetensors") for name in ("policy", "reward_model"))
    found = _tensors(runs / "gae_one")
    name = "model.embed_tokens.weight"
    for role in ("critic", "classifier"):
        distance = [(found[f"{role}/{name}"] - start[name]).norm() for start in (policy, reward_model)]
        assert distance[0] < distance[1], role


def test_a_resumed_run_is_the_uninterrupted_one(world: Path, place: Path, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "gae_one", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "iter_0000004")
    on = _run(world, place, tmp_path / "run", *KINDS["gae"])
    other = _run(world, place, tmp_path / "run", *KINDS["gae"], function="gives_nan")
    refused, resumed = _call(1, world, [other, on], tmp_path / "calls")[0]
    assert (refused.code, resumed.code) == (2, 0), (refused, resumed)
    assert "scores so far are another function's" in refused.stderr
    assert "at iteration 2 of 4" in resumed.stderr
    assert _metrics(tmp_path / "run") == _metrics(runs / "gae_one")
    tensors, others = _tensors(runs / "gae_one"), _tensors(tmp_path / "run")
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)


def test_a_run_of_before_there_were_functions_goes_on(world: Path, tmp_path: Path) -> None:
    """Its config.yaml has no section reward, by which the runs of `reward` are known."""
    run = arguments("ppo", world, tmp_path / "run", "ppo.iterations=2")
    assert _call(1, world, [run], tmp_path / "calls")[0][0].code == 0
    config = tmp_path / "run" / "config.yaml"
    text = config.read_text()
    begin, end = text.index("reward:\n"), text.index("\nppo:\n") + 1
    config.write_text(text[:begin] + text[end:])
    answer = _call(1, world, [[*run, "ppo.iterations=3"]], tmp_path / "calls")[0][0]
    assert answer.code == 0, answer.stderr
    assert "resuming" in answer.stderr


FAILURES = {
    "fails_on_one": ("dp2", "raised ValueError: a bonus that I do not like (rules.py:14) for row 24 of {rows} ("),
    "gives_nan": ("dp2", "gives row NUMBER of {rows} nan (float), which is not finite in float32 (response "),
    "sleeps": ("tp2", "has not answered within reward.timeout_s=0.5 for 8 rows, the first row NUMBER of {rows}"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_on_one_rank_ends_all_with_one_line(name: str, world: Path, place: Path, tmp_path: Path) -> None:
    layout, text = FAILURES[name]
    size, settings = LAYOUTS[layout]
    run = _run(world, place, tmp_path / "run", *ALONE, *settings, "reward.timeout_s=0.5", function=name)
    ranks = [answers[0] for answers in _call(size, world, [run], tmp_path / "calls")]
    assert [answer.code for answer in ranks] == [1, 1], ranks
    said = [line for line in ranks[0].stderr.splitlines() if line.startswith("megatron-gil ppo:")]
    assert len(said) == 1, ranks[0].stderr
    begin = f"megatron-gil ppo: reward.function={place / 'rules.py'}:{name} "
    expected = re.escape(begin + text.format(rows=place / "prompts.jsonl")).replace("NUMBER", r"\d+")
    assert re.match(expected, said[0]), said
    assert "Traceback" not in "".join(answer.stderr for answer in ranks)
    assert "megatron-gil ppo:" not in ranks[1].stderr


REFUSALS = {
    ("reward.function=null",): "models.reward_model is not set; give the directory of a model, as models.reward_model="
    "DIR, or a function, as reward.function=package.module:name",
    ("data.train={world}/prompts.jsonl",): "needs the argument bonus, and no row of {world}/prompts.jsonl has a field "
    "of that name; the fields there are group",
    ("data.eval={world}/prompts.jsonl",): "needs the argument bonus, and no row of {world}/prompts.jsonl has a field",
    ("reward.timeout_s=600",): "reward.timeout_s=600 must lie below parallel.timeout_s=600",
    ("reward.timeout_s=0",): "reward.timeout_s=0 must be above 0",
    ("reward.threads=0",): "reward.threads=0 must be at least 1",
    ("reward.function=nowhere:f",): "reward.function=nowhere:f: no module named nowhere",
}


def test_what_cannot_be_is_said_before_the_run_and_by_its_dry_run(world: Path, place: Path, tmp_path: Path) -> None:
    runs = [
        _run(world, place, tmp_path / "run", *ALONE, *(text.format(world=world) for text in settings))
        for settings in REFUSALS
    ]
    answers = _call(1, world, [call for run in runs for call in (run, [*run, "--dry-run"])], tmp_path / "calls")[0]
    for i, text in enumerate(REFUSALS.values()):
        for answer in answers[2 * i : 2 * i + 2]:
            assert (answer.code, answer.stderr.count("\n")) == (2, 1), answer
            assert text.format(world=world) in answer.stderr
    assert not (tmp_path / "run").exists()
