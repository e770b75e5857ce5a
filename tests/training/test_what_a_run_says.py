"""The first lines of a run, its console and its samples: what a person reads before and while it trains."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.training.run.first_lines import count_text
from megatron_gil.training.run.metrics import short
from tests.faults.running import Call, arguments, call_all
from tests.ranks import run_ranks

STAGES = ("sft", "reward", "dpo", "ppo")
EVERY_ROW = ("log.samples_every=1", "log.samples=8")
LAYOUTS = {"one": (1, ()), "pp2": (2, ("parallel.pipeline_size=2",))}


@pytest.fixture(scope="module")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Path, str]]:
    """(stage, layout) -> its run directory, and what rank 0 said."""
    directory = tmp_path_factory.mktemp("said")
    found = {}
    for name, (world_size, settings) in LAYOUTS.items():
        calls = [Call(arguments(s, world, directory / f"{s}_{name}", *EVERY_ROW, *settings)) for s in STAGES]
        answers = run_ranks(call_all, world_size, calls, world)[0]
        for stage, answer in zip(STAGES, answers, strict=True):
            assert answer.code == 0, answer.stderr
            found[stage, name] = (directory / f"{stage}_{name}", answer.stderr)
    return found


def _rows(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.mark.parametrize("stage", STAGES)
def test_the_first_lines_say_what_is_about_to_happen(stage: str, runs: dict[tuple[str, str], tuple[Path, str]]) -> None:
    run, said = runs[stage, "pp2"]
    first = " ".join(said.partition("1/4")[0].split())
    models = {
        "sft": ("policy",),
        "reward": ("reward_model",),
        "dpo": ("policy", "ref_policy"),
        "ppo": ("policy", "ref_policy", "critic", "classifier", "reward_model"),
    }[stage]
    length = "4 iterations of 8 prompts" if stage == "ppo" else "4 updates of 8 rows"
    parts = [
        f"writes {run}",
        "device CPU, 1 thread(s) a process",
        "layout 2 process(es): 1 tensor- x 2 pipeline- x 1 data-parallel; an update is 4 microbatch(es) of 2 on each",
        *(rf"{model} [\d.]+ thousand parameters, float32, (trained|frozen), from /" for model in models),
        r"data.train /\S+: 24 rows, ",
        r"data.eval /\S+: 23 rows, ",
        f"to do {length}",
        r"memory [\d.]+ GiB in this process",
    ]
    assert re.search(".*".join(part.replace("(es)", r"\(es\)").replace("(s)", r"\(s\)") for part in parts), first), said


@pytest.mark.parametrize("stage", STAGES)
def test_the_console_fits_80_columns(stage: str, runs: dict[tuple[str, str], tuple[Path, str]]) -> None:
    lines = runs[stage, "one"][1].splitlines()
    assert sum(bool(re.match(r"\d/4  ", line)) for line in lines) == 4
    ours = [line for line in lines if "/tmp" not in line and "warning: " not in line]  # these are broken by terminals
    assert max(map(len, ours)) <= 80


WAITING = {
    ("sft", "frozen"): "nothing: all that is there is always read",
    ("sft", "all"): r"optimizer state of policy but in its own steps: 0\.0 GiB of this process",
    ("dpo", "rollout"): r"weights of ref_policy while they are not read: 0\.0 GiB of this process",
    ("ppo", "rollout"): (
        r"weights of ref_policy, reward_model while they are not read; optimizer state of policy, critic, classifier "
        r"while responses are sampled and scored: 0\.0 GiB of this process"
    ),
}


def test_the_first_lines_say_what_waits_on_the_host(world: Path, tmp_path: Path) -> None:
    calls = []
    for stage, offload in WAITING:
        length = "ppo.iterations=1" if stage == "ppo" else "train.updates=1"
        run = tmp_path / f"{stage}_{offload}"
        calls.append(Call(arguments(stage, world, run, length, f"models.offload={offload}")))
    for expected, answer in zip(WAITING.values(), run_ranks(call_all, 1, calls, world)[0], strict=True):
        assert answer.code == 0, answer.stderr
        assert re.search(rf"on the host +{expected} data\.train", " ".join(answer.stderr.split())), answer.stderr


def test_numbers_of_the_console() -> None:
    shown = {0.0: "0", -0.3843: "-0.384", 0.0003843: "0.00038", 18880.0: "18.9k", 999.4: "999", 2.5e6: "2.5M"}
    assert {value: short(value) for value in shown} == shown
    assert short(float("nan")) == "nan"
    assert [count_text(n) for n in (12, 262144, 6_738_415_616)] == ["12", "262 thousand", "6.74 billion"]


def test_samples_of_sft_are_the_rows_with_their_loss(
    world: Path, runs: dict[tuple[str, str], tuple[Path, str]]
) -> None:
    """Of the first update: the loss of the model as it was read, by transformers."""
    samples = [row for row in _rows(runs["sft", "one"][0], "samples.jsonl") if row["iteration"] == 0]
    assert len(samples) == 8
    model = LlamaForCausalLM.from_pretrained(world / "policy")
    tokenizer = Tokenizer.read(world / "policy")
    known = {(r["prompt"], r["completion"]) for r in _rows(world, "demonstrations.jsonl")}
    for sample in samples:
        assert (sample["prompt"], sample["target"]) in known
        prompt = tokenizer.encode(sample["prompt"], bos=True)
        response = [*tokenizer.encode_continuation(sample["target"]), tokenizer.eos_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(response))
        assert sample["loss"] == pytest.approx(float(expected), rel=1e-4)  # float32, another order of sums


@pytest.mark.parametrize(("stage", "kind"), [("reward", "score"), ("dpo", "reward")])
def test_samples_of_pairs_are_what_the_metrics_average(
    stage: str, kind: str, world: Path, runs: dict[tuple[str, str], tuple[Path, str]]
) -> None:
    run = runs[stage, "one"][0]
    known = {(r["prompt"], r["chosen"], r["rejected"]) for r in _rows(world, "preferences.jsonl")}
    margins = []
    for iteration, metrics in enumerate(_rows(run, "metrics.jsonl")):
        samples = [row for row in _rows(run, "samples.jsonl") if row["iteration"] == iteration]
        assert len(samples) == 8  # all rows of the update
        assert all((row["prompt"], row["chosen"], row["rejected"]) in known for row in samples)
        for row in samples:
            assert row["margin"] == row[f"{kind}_chosen"] - row[f"{kind}_rejected"]
        margin = fmean(row["margin"] for row in samples)
        assert margin == pytest.approx(metrics[f"{stage}/margin"], rel=1e-5, abs=1e-6)
        margins.append(margin)
    assert any(margins)


@pytest.mark.parametrize("stage", STAGES)
def test_samples_do_not_depend_on_the_layout(stage: str, runs: dict[tuple[str, str], tuple[Path, str]]) -> None:
    """The last pipeline rank has the numbers, rank 0 writes them."""
    one, two = (_rows(runs[stage, name][0], "samples.jsonl") for name in LAYOUTS)
    assert len(one) == len(two) == 32
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            if isinstance(value, str | int):
                assert b[key] == value
            else:  # float32 through four updates
                assert b[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key


def test_a_run_that_has_more_iterations_than_asked_for_says_so(
    world: Path, runs: dict[tuple[str, str], tuple[Path, str]]
) -> None:
    run = runs["sft", "one"][0]
    finished = arguments("sft", world, run, *EVERY_ROW)
    answers = run_ranks(call_all, 1, [Call(finished), Call([*finished, "train.updates=2"])], world)[0]
    assert [answer.code for answer in answers] == [0, 0]
    assert f"{run} is finished: it has all 4 iterations; nothing to do" in answers[0].stderr
    assert (
        f"{run} has 4 iterations already, more than the 2 that train.updates or train.epochs asks for"
        in answers[1].stderr
    )
    assert "at iteration 4 of 2" not in answers[1].stderr
