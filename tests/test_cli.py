"""What a user gets wrong is one line on stderr, naming the key and the fix, and exit code 2, on any number of ranks."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_gil.cli import COMMANDS, main
from megatron_gil.config import PpoConfig
from megatron_gil.config.files import dump_config, load_config
from tests.ranks import PATIENCE_S, run_ranks
from tests.training.running import use_cache
from tests.world import write_json, write_rows


def _good(world: Path, tmp_path: Path) -> dict[str, str]:
    return {
        "run.dir": f"{tmp_path / 'run'}",
        "models.policy": f"{world / 'policy'}",
        "data.train": f"{world / 'demonstrations.jsonl'}",
        "data.max_tokens": "48",
        "data.max_prompt_tokens": "32",
        "batch.global_size": "8",
        "batch.micro_size": "4",
        "train.updates": "1",
    }


def _sft(good: dict[str, str], **changes: str | None) -> list[str]:
    values = {**good, **{key.replace("__", "."): value for key, value in changes.items()}}
    return ["sft", *(f"{key}={value}" for key, value in values.items() if value is not None)]


def _call(arguments: list[str], root: Path) -> tuple[int, str, str]:
    use_cache(root)
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()) as printed:
        code = main(arguments)
    return code, said.getvalue(), printed.getvalue()


def _call_all(calls: list[list[str]], root: Path) -> list[tuple[int, str, str]]:
    return [_call(arguments, root) for arguments in calls]


def _bad_files(tmp_path: Path, world: Path) -> dict[str, str]:
    """Paths of what is broken, by name."""
    rows = [{"prompt": "sun", "completion": " sea"}]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("precious")
    (tmp_path / "broken.yaml").write_text("batch: {global_size: 4\n")
    (tmp_path / "not_json.jsonl").write_text('{"prompt": "sun", "completion": " sea"}\n{"prompt": sun}\n')
    for name, changes in {"few_layers": {"num_hidden_layers": 1}, "one_kv_head": {"num_key_value_heads": 1}}.items():
        shutil.copytree(world / "policy", tmp_path / name)
        config = json.loads((world / "policy" / "config.json").read_text())
        write_json(tmp_path / name / "config.json", {**config, **changes})
    shutil.copytree(world / "policy", tmp_path / "no_weights")
    (tmp_path / "no_weights" / "model.safetensors").unlink()
    shutil.copytree(world / "policy", tmp_path / "cut_weights")
    with (tmp_path / "cut_weights" / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    for name in ("iter_0000001/policy", "iter_0000002/critic", "iter_0000002/policy"):
        shutil.copytree(world / "policy", tmp_path / "a_run" / "checkpoints" / name)
    return {
        "foreign": str(foreign),
        "a_run": str(tmp_path / "a_run"),
        "broken_yaml": str(tmp_path / "broken.yaml"),
        "not_json": str(tmp_path / "not_json.jsonl"),
        "field": str(write_rows(tmp_path / "field.jsonl", [*rows, {"prompt": "sun", "completion": 7}])),
        "missing": str(write_rows(tmp_path / "missing.jsonl", [*rows, *rows, {"prompt": "sun"}])),
        **{name: str(tmp_path / name) for name in ("few_layers", "one_kv_head", "no_weights", "cut_weights")},
    }


def test_one_line_for_every_mistake(world: Path, tmp_path: Path) -> None:
    good, bad = _good(world, tmp_path), _bad_files(tmp_path, world)
    (tmp_path / "there.jsonl").write_text("mine")
    generate = ["generate", f"models.policy={world / 'policy'}", f"data.train={world / 'prompts.jsonl'}"]
    short = ["data.max_prompt_tokens=40", "sampling.max_new_tokens=24"]
    cases: list[tuple[list[str], str]] = [
        (_sft(good, batch__global_sice="8"), "unknown key batch.global_sice; did you mean batch.global_size?"),
        (_sft(good, bacth__global_size="8"), "unknown key bacth; did you mean batch?"),
        (_sft(good, batch__global_size="eight"), "batch.global_size"),
        (_sft(good, models__dtype="float8"), "models.dtype"),
        (_sft(good, batch__micro_size="0"), "batch.micro_size=0 must be at least 1"),
        (_sft(good, batch__micro_size="3"), "batch.global_size=8 cannot be divided by 1 data-parallel ranks x"),
        (_sft(good, parallel__tensor_size="2"), "1 processes cannot be divided by parallel.tensor_size=2"),
        (_sft(good, parallel__sequence_parallel="true"), "needs parallel.tensor_size above 1"),
        (_sft(good, run__dir=None), "run.dir is not set"),
        (_sft(good, models__policy=None), "models.policy is not set"),
        (_sft(good, models__policy=str(tmp_path / "nowhere")), "nowhere is not a directory"),
        (_sft(good, models__policy=bad["no_weights"]), "no_weights: holds no model.safetensors"),
        (
            _sft(good, models__policy=str(tmp_path)),
            f"={tmp_path} holds no config.json, and so no model; take a model below",
        ),
        (
            _sft(good, models__policy=bad["a_run"]),
            "take a model below it, as " + bad["a_run"] + "/checkpoints/iter_0000002/policy\n",
        ),
        (_sft(good, models__policy=bad["foreign"]), "foreign holds no config.json, and so no model"),
        (_sft(good, models__policy=bad["cut_weights"]), "model.safetensors: cut off or not a safetensors file"),
        (_sft(good, data__train=None), "data.train is not set"),
        (_sft(good, data__train=str(tmp_path / "none.jsonl")), "none.jsonl: no such file"),
        (_sft(good, data__train=bad["not_json"]), "not_json.jsonl:2: not valid JSON"),
        (_sft(good, data__train=bad["field"]), "field.jsonl:2: field completion"),
        (_sft(good, data__train=bad["missing"]), "missing.jsonl:3:"),
        (_sft(good, run__dir=bad["foreign"]), "is not empty and holds no config.yaml"),
        (["sft", "--config", bad["broken_yaml"]], "broken.yaml: not valid YAML"),
        (["sft", "--config", str(tmp_path / "absent.yaml")], "absent.yaml: cannot be read"),
        (["sft", "run.dir"], "'run.dir' is not an override; write section.key=value"),
        ([*generate, *short, f"output={tmp_path / 'there.jsonl'}"], "there.jsonl exists already; nothing is"),
        (_sft(good, data__max_tokens="65"), "data.max_tokens=65 is above the 64 positions of models.policy="),
        (
            [*generate, "data.max_prompt_tokens=40", "sampling.max_new_tokens=25", "output=x"],
            "data.max_prompt_tokens=40 + sampling.max_new_tokens=25 is above the 64 positions of models.policy=",
        ),
        (
            ["score", f"models.reward_model={world / 'policy'}", f"data.train={bad['field']}", "output=x"],
            "has no score.weight; train it with `megatron-gil reward` first",
        ),
    ]
    answers = run_ranks(_call_all, 1, [arguments for arguments, _ in cases], world)[0]
    for (arguments, expected), (code, said, printed) in zip(cases, answers, strict=True):
        assert code == 2, (arguments, said)
        assert said.startswith(f"megatron-gil {arguments[0]}: "), said
        assert said.count("\n") == 1, said
        assert expected in said, said
        assert printed == ""
    assert not (tmp_path / "run").exists(), "a mistake left a run directory behind"
    assert (tmp_path / "there.jsonl").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"parallel.pipeline_size": "2", "models.policy": "few_layers"},
            "num_hidden_layers=1 .*parallel.pipeline_size=2",
        ),
        (
            {"parallel.tensor_size": "2", "models.policy": "one_kv_head"},
            "num_key_value_heads=1 cannot be divided by parallel.tensor_size=2",
        ),
        ({"data.train": "field"}, "field.jsonl:2: field completion"),
        ({"run.dir": "foreign"}, "is not empty and holds no config.yaml"),
        ({"batch.micro_size": "8"}, "batch.global_size=8 cannot be divided by 2 data-parallel ranks x"),
    ],
    ids=["layers", "heads", "data", "directory", "batch"],
)
def test_two_ranks_still_say_one_line(changes: dict[str, str], expected: str, world: Path, tmp_path: Path) -> None:
    bad = _bad_files(tmp_path, world)
    arguments = _sft({**_good(world, tmp_path), **{key: bad.get(value, value) for key, value in changes.items()}})
    first, second = (rank[0] for rank in run_ranks(_call_all, 2, [arguments], world))
    assert first[0] == second[0] == 2, (first, second)
    assert first[1].count("\n") == 1
    assert re.search(expected, first[1]), first[1]
    assert second[1] == ""


def _environment(world: Path) -> dict[str, str]:
    own = {"HF_DATASETS_CACHE": str(world / "cache"), "OMP_NUM_THREADS": "1"}
    return {**{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}, **own}


def test_under_torchrun_nothing_but_the_line_is_ours(world: Path, tmp_path: Path) -> None:
    """torchrun reports the exit codes in its own words; our processes print one line and no traceback."""
    bad = _bad_files(tmp_path, world)
    arguments = _sft(_good(world, tmp_path), data__train=bad["field"])
    logs = tmp_path / "logs"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--redirects=3",
         f"--log-dir={logs}", "-m", "megatron_gil", *arguments],
        env=_environment(world), capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode != 0
    said = {path.parent.name: path.read_text() for path in logs.rglob("stderr.log")}
    assert sorted(said) == ["0", "1"]
    lines = [line for text in said.values() for line in text.splitlines()]
    assert len(lines) == 1, said
    assert "field.jsonl:2: field completion" in lines[0]
    assert "exitcode  : 2" in done.stderr


def test_a_process_of_its_own(world: Path, tmp_path: Path) -> None:
    arguments = _sft(_good(world, tmp_path), batch__global_sice="8")
    done = subprocess.run(
        [sys.executable, "-m", "megatron_gil", *arguments],
        env=_environment(world),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "megatron-gil sft: override batch.global_sice=8: unknown key batch.global_sice; did you mean "
        "batch.global_size?\n"
    )


def test_help_answers_at_once(world: Path) -> None:
    """0.7 s of processor time, the best of three; torch is not imported."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "megatron_gil", "--help"], capture_output=True, text=True, timeout=PATIENCE_S
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0
        assert all(command in done.stdout for command in COMMANDS)
    assert min(seconds) < 0.7, seconds
    heavy = "import sys, megatron_gil.cli; sys.exit(str({'torch', 'omegaconf', 'transformers'} & set(sys.modules)))"
    found: Any = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, timeout=PATIENCE_S)
    assert found.stderr.strip() == "set()"


def test_training_does_not_load_the_compiler_where_there_is_no_gpu() -> None:
    """megatron.core asks for it as it is imported, and that is half of the time that training takes to start."""
    check = """
import sys, torch
compile = torch.compile
import megatron_gil.commands.train
assert torch.compile is compile
assert "torch._inductor.compile_fx" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", check], check=True, timeout=120)


def test_overrides_may_stand_on_both_sides_of_an_option(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *others = _sft(_good(world, tmp_path))[1:]
    code, said, printed = run_ranks(_call_all, 1, [["sft", first, "--dry-run", *others]], world)[0][0]
    assert (code, said) == (0, "")
    assert "global_size: 8" in printed
    with pytest.raises(SystemExit, match="2"):
        main(["sft", first, "--dryrun"])
    assert "unrecognized arguments: --dryrun" in capsys.readouterr().err


def test_off_is_a_word_where_yaml_reads_a_truth_value(tmp_path: Path) -> None:
    (tmp_path / "ppo.yaml").write_text("run: {dir: x}\nsampling: {cuda_graphs: off}\n")
    for path, overrides in ((tmp_path / "ppo.yaml", []), (None, ["run.dir=x", "sampling.cuda_graphs=off"])):
        config = load_config(PpoConfig, path, overrides)
        assert config.sampling.cuda_graphs == "off"
        (tmp_path / "again.yaml").write_text(dump_config(config))
        assert load_config(PpoConfig, tmp_path / "again.yaml", []) == config
