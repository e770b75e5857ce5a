"""`--dry-run`: what it prints, what it refuses, and that it needs neither megatron nor a written run directory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_gil.cli import main
from tests.ranks import PATIENCE_S


def ppo(world: Path, *more: str) -> list[str]:
    models = (f"models.policy={world / 'policy'}", f"models.reward_model={world / 'reward_model'}")
    sizes = ("batch.global_size=16", "batch.micro_size=4", "ppo.prompts=16", "sampling.max_new_tokens=8")
    sizes = (*sizes, "data.max_prompt_tokens=40")
    return ["ppo", f"run.dir={world / 'never'}", f"data.train={world / 'prompts.jsonl'}", *models, *sizes, *more]


def test_every_rank_and_model_is_shown(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ppo(world, "parallel.pipeline_size=2", "--dry-run", "--gpus", "4")) == 0
    shown = capsys.readouterr().out
    for text in (
        "each of ranks 0 to 1: layers 0 to 0, embedding",
        "each of ranks 2 to 3: layers 1 to 1, head",
        "1 tensor- x 2 pipeline- x 2 data-parallel",
        "prompts.jsonl: 24 rows, none cut to data.max_prompt_tokens=40; the longest has ",
        "2,000 iterations of 16 prompts",
        "global_size: 16",
        "KV cache",
        *("policy", "ref_policy", "critic", "reward_model", "rollout", "update critic"),
    ):
        assert text in shown
    assert not (world / "never").exists()


def test_a_token_budget_counts_as_so_many_full_rows(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of up to 40 + 8 tokens: 96 are two of them."""

    def peak(*settings: str) -> str:
        assert main(ppo(world, *settings, "--dry-run")) == 0
        shown = capsys.readouterr().out
        assert ("microbatches of at most 96 tokens" in shown) == ("batch.micro_tokens=96" in settings)
        return next(line for line in shown.splitlines() if "update policy" in line)

    assert peak("batch.micro_tokens=96") == peak("batch.micro_size=2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--gpus", "3"), "3 data-parallel ranks"),
        (("parallel.tensor_size=3", "--gpus", "3"), "num_attention_heads=4 cannot be divided"),
        (("data.train=nowhere.jsonl",), "nowhere.jsonl"),
        (("models.reward_model=nowhere",), "--sizes-from"),
        (("models.critic=nowhere",), "models.critic=nowhere is not a directory"),
        (("ppo.prompts=15",), "cannot be divided by batch.global_size=16"),
        (("--gpu-memory", "2"), "do not fit in --gpu-memory 2"),
    ],
)
def test_what_cannot_run_is_one_line_and_exit_code_2(
    world: Path, change: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [part for part in change if "=" in part]
    options = [part for part in change if "=" not in part]
    assert main([*ppo(world, *settings), "--dry-run", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_what_fits_with_models_on_the_host_alone_names_the_setting(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = (*ppo(world), "batch.micro_size=1", "sampling.micro_size=1", "--dry-run", "--gpu-memory")
    few_mib = "4.0007"  # beside the 4 GiB that every process takes
    assert main([*sizes, few_mib]) == 2
    error = capsys.readouterr().err
    assert "do not fit in --gpu-memory 4.0007; models.offload=" in error
    fix = error.partition("; ")[2].split()[0]
    assert main([*sizes[:-1], "--gpu-memory", few_mib, fix]) == 0
    assert "below 0: what waits on the host" in capsys.readouterr().out


def test_a_policy_is_no_reward_model(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ppo(world, f"models.reward_model={world / 'policy'}"), "--dry-run"]) == 2
    assert "score.weight" in capsys.readouterr().err


def _shapes(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    save_file({**tensors, "model.norm.weight": torch.ones(3)}, path / "model.safetensors")


def _layers(path: Path, count: int) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": count}))


@pytest.mark.parametrize("role", ["policy", "reward_model"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "model.safetensors").write_bytes(b""), "not a safetensors file"),
        (lambda path: (path / "model.safetensors").write_bytes(b"\x7f" * 5000), "not a safetensors file"),
        (lambda path: os.truncate(path / "model.safetensors", 5000), "cut off"),
        (lambda path: (path / "model.safetensors").unlink(), "holds no model.safetensors"),
        (_shapes, "tensor model.norm.weight has shape [3], expected"),
        (lambda path: _layers(path, 3), "no tensor model.layers.2.input_layernorm.weight"),
        (lambda path: _layers(path, 10**9), "num_hidden_layers is 1000000000, expected a whole number from 1 to 10000"),
    ],
)
def test_weights_that_are_not_those_of_config_json(
    role: str, damage: Any, message: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world / role, tmp_path / "model")
    damage(tmp_path / "model")
    assert main([*ppo(world, f"models.{role}={tmp_path / 'model'}"), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(tmp_path / "model") in error
    assert error.count("\n") == 1


def test_models_that_an_earlier_run_has_yet_to_write(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ppo(world, "models.reward_model=later/final/reward_model")
    assert main([*settings, "--dry-run", "--sizes-from", str(world / "policy")]) == 0
    assert "is not there yet" in capsys.readouterr().out


def test_megatron_is_not_imported(world: Path) -> None:
    code = (
        "import sys; from megatron_gil.cli import main; "
        f"status = main({[*ppo(world), '--dry-run']!r}); "
        "sys.exit(status or 3 * any(name.startswith('megatron.') for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr


def test_answers_can_be_checked_before_the_model_is_trained(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = tmp_path / "run" / "policy"
    generate = ["generate", f"models.policy={later}", f"data.train={world / 'prompts.jsonl'}", "--dry-run"]
    score = ["score", f"models.reward_model={later}", f"data.train={tmp_path / 'later.jsonl'}", "--dry-run"]
    output = f"output={tmp_path / 'later' / 'rows.jsonl'}"
    limits = ["data.max_prompt_tokens=32", "data.max_tokens=48"]
    generate, score = [*generate, *limits, "sampling.max_new_tokens=8"], [*score, *limits]
    sizes = ["--sizes-from", str(world / "policy")]
    assert main([*generate, output, *sizes]) == 0
    assert "prompts.jsonl: 24 rows" in capsys.readouterr().out
    assert main([*score, output, *sizes]) == 0
    assert "later.jsonl is not there yet" in capsys.readouterr().out
    for wrong, message in (
        ([*generate, output], "is not a directory; where an earlier stage has yet to write it"),
        ([*generate, output, *sizes, "checkpoint.every=2"], "unknown key checkpoint"),
        ([*generate, f"output={tmp_path / 'x.out'}", *sizes], "must end in .jsonl"),
        ([*score, output, *sizes, "parallel.tensor_size=3"], "num_attention_heads=4 cannot be divided"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
