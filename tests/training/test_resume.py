"""A run that was interrupted ends as one that was not, to the last bit: weights, moments, state and logged numbers."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_gil.cli import main
from megatron_gil.jsonl import iter_jsonl
from tests.ranks import run_ranks
from tests.training.running import use_cache
from tests.world import write_rows

NUM_ITERATIONS, STOPPED = 4, 2


def _arguments(command: str, root: Path, run: Path, *more: str) -> list[str]:
    data = {"sft": "demonstrations", "reward": "preferences", "dpo": "preferences", "ppo": "prompts"}[command]
    common = [
        f"run.dir={run}",
        f"data.train={root / data}.jsonl",
        f"data.eval={root / data}.jsonl",
        "data.max_tokens=48",
        "data.max_prompt_tokens=32",
        "batch.global_size=8",
        "batch.micro_size=4",
        "optimizer.lr=0.01",
        "checkpoint.every=1",
        "checkpoint.keep_last=9",
        "log.samples_every=2",
        "log.tensorboard=false",
    ]
    own = {
        "sft": [f"models.policy={root / 'tied'}", f"train.updates={NUM_ITERATIONS}", "log.eval_every=2"],
        "reward": [f"models.reward_model={root / 'policy'}", f"data.tokenizer={root / 'policy'}", "train.epochs=2"],
        "dpo": [f"models.policy={root / 'policy'}", f"train.updates={NUM_ITERATIONS}"],
        "ppo": [
            f"models.policy={root / 'policy'}",
            f"models.reward_model={root / 'reward_model'}",
            f"data.pretrain={root / 'demonstrations.jsonl'}",
            "critic_optimizer.lr=0.01",
            f"ppo.iterations={NUM_ITERATIONS}",
            "ppo.prompts=8",
            "ppo.responses_per_prompt=2",
            "ppo.ptx_coef=0.1",
            "sampling.max_new_tokens=8",
            "gil.warmup_updates=3",
            "gil.ramp_updates=4",
            "alarms.length_factor=0.9",  # stands in every iteration
        ],
    }[command]
    return [command, *common, *own, *more]


KL_TARGETS = ("gil.kl_target_high=0.5", "gil.kl_target_low=2")
RUNS = {
    "sft": ("sft",),
    "reward": ("reward",),
    "dpo": ("dpo",),
    "ppo": ("ppo",),
    "ppo_own_model": ("ppo", "gil.classifier=own_model", "ppo.epochs=2", *KL_TARGETS),
    "dpo_offload": ("dpo", "models.offload=all"),
    "ppo_own_model_offload": ("ppo", "gil.classifier=own_model", "ppo.epochs=2", *KL_TARGETS, "models.offload=all"),
}
ACROSS_RANKS = {
    "ppo_dp2": ("ppo", "parallel.distributed_optimizer=true"),
    "ppo_dp2_offload": ("ppo", "parallel.distributed_optimizer=true", "models.offload=rollout"),
}


def _call(arguments: list[str], root: Path) -> tuple[int, str]:
    use_cache(root)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(arguments)
    return code, said.getvalue()


def _call_all(calls: list[list[str]], root: Path) -> list[tuple[int, str]]:
    return [_call(arguments, root) for arguments in calls]


def _crash(whole: Path, resumed: Path) -> None:
    """A copy of the run as a crash after iteration STOPPED leaves it."""
    shutil.copytree(whole, resumed)
    for checkpoint in (resumed / "checkpoints").glob("iter_*"):
        if int(checkpoint.name[5:]) > STOPPED:
            shutil.rmtree(checkpoint)
    with (resumed / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "sft/lo')  # cut short


def _run_and_resume(runs: dict[str, tuple[str, ...]], world_size: int, root: Path, directory: Path) -> dict[str, Any]:
    """Each run to its end, then from the crash to its end, then once more: what each call answered and said."""

    def arguments(suffix: str, *more: str) -> list[list[str]]:
        return [_arguments(command, root, directory / (n + suffix), *own, *more) for n, (command, *own) in runs.items()]

    whole = run_ranks(_call_all, world_size, arguments(""), root)[0]
    for name in runs:
        _crash(directory / name, directory / f"{name}_resumed")
    again = run_ranks(_call_all, world_size, arguments("_resumed", "log.samples=3"), root)[0]
    finished = run_ranks(_call_all, world_size, arguments("_resumed"), root)[0]
    return {name: answers for name, *answers in zip(runs, whole, again, finished, strict=True)}


@pytest.fixture(scope="module")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("runs")
    return directory, {
        **_run_and_resume(RUNS, 1, world, directory),
        **_run_and_resume(ACROSS_RANKS, 2, world, directory),
    }


def _rows(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    rows = [row for _, row in iter_jsonl(run / name)]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def _checkpoint(run: Path) -> tuple[dict[str, Tensor], Any]:
    path = max((run / "checkpoints").glob("iter_*"))
    tensors = {
        f"{file.parent.name}/{name}": tensor
        for file in path.rglob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    return tensors, json.loads((path / "state.json").read_text())


@pytest.mark.parametrize("name", [*RUNS, *ACROSS_RANKS])
def test_a_resumed_run_is_the_uninterrupted_one(name: str, runs: tuple[Path, dict[str, Any]]) -> None:
    directory, said = runs
    (whole_code, whole_text), (code, text), (finished_code, _) = said[name]
    assert whole_code == code == finished_code == 0, whole_text + text
    num_iterations = len(_rows(directory / name))
    assert f"resuming {directory / name}_resumed at iteration {STOPPED} of {num_iterations}" in text.replace("\n", " ")
    whole, resumed = _checkpoint(directory / name), _checkpoint(directory / f"{name}_resumed")
    assert resumed[1] == whole[1]
    assert resumed[1]["iteration"] == num_iterations
    assert resumed[0].keys() == whole[0].keys()
    differ = [key for key in whole[0] if not torch.equal(resumed[0][key], whole[0][key])]
    assert not differ
    rows = _rows(directory / name)
    assert _rows(directory / f"{name}_resumed") == rows
    assert [row["iteration"] for row in rows] == list(range(num_iterations))
    assert any(key.startswith("eval/") for key in rows[-1])
    assert rows[0] | {"iteration": 1} != rows[1], "nothing moves"


@pytest.mark.parametrize("name", ["dpo", "ppo_own_model", "ppo_dp2"])
def test_models_that_wait_on_the_host_give_the_same_run(name: str, runs: tuple[Path, dict[str, Any]]) -> None:
    directory = runs[0]
    assert _rows(directory / f"{name}_offload") == _rows(directory / name)
    (tensors, state), (others, other_state) = (_checkpoint(directory / run) for run in (name, f"{name}_offload"))
    assert other_state == state
    assert others.keys() == tensors.keys()
    assert all(torch.equal(others[key], tensors[key]) for key in tensors)


def test_the_state_is_not_trivial(runs: tuple[Path, dict[str, Any]]) -> None:
    state = _checkpoint(runs[0] / "ppo")[1]["state"]["trainer"]
    assert state["num_updates"] == 2 * NUM_ITERATIONS
    assert state["moments"]["count"] == 16 * NUM_ITERATIONS
    assert None not in state["grouping"]["ema"]
    assert state["alarms"]["kl_means"].keys() == {"sequence", "group_0", "group_1"}
    assert state["alarms"]["episodes"]["length"] == 0
    assert state["trends"]["past"].keys() == {"", "_group_0", "_group_1"}
    assert len(state["alarms"]["score_range"]) == 2  # of the first rollout: the reward model was trained elsewhere


def test_differences_of_the_config_are_listed(runs: tuple[Path, dict[str, Any]]) -> None:
    text = runs[1]["sft"][1][1]
    assert "resuming with another setting: log.samples: 4 -> 3" in text
    assert text.count("another setting") == 2, text  # and run.dir, which the copy changed
    resumed = runs[0] / "sft_resumed"
    history = [json.loads(line) for line in (resumed / "config_history.jsonl").read_text().splitlines()]
    assert [(row["iteration"], row["key"]) for row in history] == [(STOPPED, "run.dir"), (STOPPED, "log.samples")]
    assert "samples: 3\n" in (resumed / "config.yaml").read_text()  # not that of the third start, which trained nothing


def test_a_group_is_one_curve_of_the_log(runs: tuple[Path, dict[str, Any]]) -> None:
    rows = _rows(runs[0] / "ppo")
    for name in ("reward/score_mean_group_0", "group/mass_1", "group/return_variance", "group/high", "policy/ptx_loss"):
        assert name in rows[-1]
    assert "policy/ratio" not in rows[0], "the policy moved before the warm-up ended"
    assert rows[1]["policy/skipped"] == 0.0


def _refusals(root: Path, directory: Path) -> dict[str, tuple[int, str]]:
    run = directory / "run"
    first = _call(_arguments("sft", root, run, "train.updates=1"), root)
    foreign = directory / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("precious")
    nan = directory / "nan"
    _spoil(root / "policy", nan)
    _spoil(root / "reward_model", directory / "nan_scores")
    responses = write_rows(directory / "responses.jsonl", [{"prompt": "sun", "response": " sea"}])
    score = ["score", f"models.reward_model={directory / 'nan_scores'}", f"data.train={responses}"]
    few = write_rows(directory / "few.jsonl", [{"prompt": "sun", "completion": " sea"}])
    return {
        "first": first,
        "resume false": _call(_arguments("sft", root, run, "run.resume=false"), root),
        "foreign": _call(_arguments("sft", root, foreign), root),
        "nan": _call(
            _arguments("sft", root, directory / "nan_run", f"models.policy={nan}", "run.max_skipped_updates=2"), root
        ),
        "nan scores": _call(
            [*score, "data.max_tokens=48", "data.max_prompt_tokens=32", f"output={directory / 'scores.jsonl'}"], root
        ),
        "few": _call(_arguments("sft", root, directory / "few_run", f"data.train={few}", f"data.eval={few}"), root),
    }


def _spoil(source: Path, target: Path) -> None:
    from safetensors.torch import save_file

    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def test_refusals_and_failures(world: Path, tmp_path: Path) -> None:
    found = run_ranks(_refusals, 1, world, tmp_path)[0]
    assert found["first"][0] == 0
    code, text = found["resume false"]
    assert (code, text.count("\n")) == (2, 1)
    assert "holds a run already" in text
    code, text = found["foreign"]
    assert (code, text.count("\n")) == (2, 1)
    assert "is not empty and holds no config.yaml" in text
    assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["thesis.tex"]
    code, text = found["nan"]
    assert code == 1
    assert text.count("update of policy skipped: rank 0: gradient norm nan, loss of microbatch 0 (rows [") == 3
    assert "3 updates were skipped for NaN or Inf, more than run.max_skipped_updates=2" in text
    assert not list((tmp_path / "nan_run" / "checkpoints").glob("iter_0000003"))
    code, text = found["nan scores"]
    assert code == 1, text
    assert "Traceback" not in text
    assert "gives 1 rows no score (the first: row 1 of " in text
    assert not (tmp_path / "scores.jsonl").exists()
    assert found["few"][0] == 0, found["few"][1]  # a data set smaller than a batch repeats rows
